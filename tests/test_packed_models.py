"""Models whose weights stay in few bits: loaded whole and split, calibrated, told apart; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import gguf_files
import narrowcast
from models import random_ids
from narrowcast import Plan
from narrowcast.engines import load_engine
from narrowcast.engines.base import Weights
from narrowcast.engines.transformers.files import loading
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Split
from narrowcast.weights.layers import PackedEmbedding, PackedLinear
from narrowcast.weights.products import ZERO_POINT_TOKENS
from ranks import Ranks
from transports import needs_mesh

Pools = Callable[[int], Ranks]

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=6),
    "phi3": lambda: Phi3Config(**SIZES, resid_pdrop=0.0),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, mlp_only_layers=[0]
    ),
}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name]()).bfloat16()
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    return folder


def load(path: Path, weights: Weights, **options: Any) -> Any:
    return load_engine().load(path, weights=weights, **options)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def answers(model: Any, plan: Plan, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), narrowcast.attach(model, plan, **options):
        text = model.generate(ids, max_new_tokens=6, do_sample=False)
        return model(ids, use_cache=False).logits, text


def on_rank(folder: Path, weights: Weights, ids: Tensor) -> tuple[Any, ...]:
    plan = Plan.load(folder / "plan")
    model = load(folder, weights, split=plan.split)
    alone = logits(model, ids)
    num_bytes = sum(each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLinear))
    return alone, num_bytes, *answers(model, plan, ids)


@needs_mesh
@pytest.mark.parametrize("weights", ["int8-group32", "int4-group32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_real_ranks_equal_the_simulation(ranks: Pools, tmp_path: Path, name: str, weights: Weights) -> None:
    model, ids = load(saved(name, tmp_path), weights), random_ids(2, 9)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    plan.save(tmp_path / "plan")
    whole = logits(model, ids)
    simulated = answers(model, plan, ids, simulate=True)

    found = ranks(2).run(on_rank, tmp_path, weights, ids)

    for alone, num_bytes, *real in found:
        assert torch.equal(real[0], simulated[0])
        assert torch.equal(real[1], simulated[1])
        assert torch.allclose(alone, whole, atol=0.05), "the engine's own sums"
        assert num_bytes < 0.6 * sum(each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLinear))


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_bits_answer_like_sixteen(tmp_path: Path, name: str) -> None:
    dense, packed = load(saved(name, tmp_path), "dense"), load(tmp_path, "int8-group32")
    ids = random_ids(2, 20)
    expected, found = logits(dense, ids).float().log_softmax(-1), logits(packed, ids).float().log_softmax(-1)

    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
    assert all(not isinstance(each, torch.nn.Linear) for each in packed.modules())


def test_an_output_layer_keeps_8_bits(tmp_path: Path) -> None:
    untied, tied = (
        load(saved("llama", tmp_path / "a"), "int4-group32"),
        load(saved("llama-tied", tmp_path / "b"), "int4-group32"),
    )

    assert untied.lm_head.matrix.format.num_bits == tied.lm_head.matrix.format.num_bits == 8
    assert untied.model.layers[0].mlp.up_proj.matrix.format.num_bits == 4
    assert isinstance(untied.model.embed_tokens, torch.nn.Embedding), "which is only looked up in"
    assert isinstance(tied.model.embed_tokens, PackedEmbedding)
    assert tied.model.embed_tokens.matrix is tied.lm_head.matrix


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_few_bits_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    engine = load_engine()
    dense, packed = load(saved(name, tmp_path), "dense"), load(tmp_path, "int4-group32")

    assert engine.fingerprint(packed) == engine.fingerprint(dense)


@pytest.mark.parametrize("name", gguf_files.CONFIGS | gguf_files.INCOMPLETE | gguf_files.EXPERTS)
def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path: Path, name: str) -> None:
    """With biases, tied layers and sizes of heads that Transformers' own loader leaves out or takes for granted."""
    path, ids = tmp_path / "model.gguf", random_ids(2, 12)
    model = gguf_files.write_gguf(path, name, gguf_files.Kind.Q8_0).bfloat16().eval()
    packed, dense = load(path, "stored"), load(path, "dense")

    assert all(not isinstance(each, torch.nn.Linear) for each in packed.modules())
    assert all(not isinstance(each, PackedLinear) for each in dense.modules())
    expected = logits(model, ids).float().log_softmax(-1)
    for found in (packed, dense):
        assert (expected.exp() * (expected - logits(found, ids).float().log_softmax(-1))).sum(-1).mean() < 2e-3
    assert load_engine().fingerprint(packed) == load_engine().fingerprint(dense)
    assert load_engine().fingerprint(packed).config == load_engine().fingerprint(load_engine().skeleton(path)).config


def any_int32(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def w4a16(folder: Path) -> Path:
    """A folder as compressed-tensors writes it, from the format's description: asymmetric, groups of 64."""
    config = LlamaConfig(**SIZES | {"intermediate_size": 512})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        num_rows, num_columns = tensors.pop(name).shape
        module, groups = name.removesuffix(".weight"), num_columns // 64
        tensors |= {
            f"{module}.weight_packed": torch.randint(
                -(2**31), 2**31 - 1, (num_rows, num_columns // 8), dtype=torch.int32
            ),
            f"{module}.weight_scale": torch.rand(num_rows, groups).mul(0.01).bfloat16(),
            f"{module}.weight_zero_point": torch.randint(
                -(2**31), 2**31 - 1, (num_rows // 8, groups), dtype=torch.int32
            ),
            f"{module}.weight_shape": torch.tensor([num_rows, num_columns]),
        }
    save_file(tensors, folder / "model.safetensors")
    scheme = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": quantization}))
    return folder


@needs_mesh
@pytest.mark.parametrize("length", [1, 3, ZERO_POINT_TOKENS])
def test_activations_in_bf16_are_the_simulated_ones_for_few_tokens_and_many(
    ranks: Pools, tmp_path: Path, length: int
) -> None:
    model, ids = load(w4a16(tmp_path), "stored"), random_ids(1, length)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    plan.save(tmp_path / "plan")
    expected = answers(model, plan, ids, simulate=True)

    assert model.model.layers[0].mlp.up_proj.matrix.format.name == "int4-group64-zero-point"
    assert isinstance(model.lm_head, torch.nn.Linear)
    for _, _, *real in ranks(2).run(on_rank, tmp_path, "stored", ids):
        assert torch.equal(real[0], expected[0])
        assert torch.equal(real[1], expected[1])


@pytest.mark.parametrize("weights", ["dense", "stored"])
def test_products_of_a_deterministic_plan_do_not_depend_on_the_batch(tmp_path: Path, weights: Weights) -> None:
    model = load(w4a16(tmp_path), weights)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(ZERO_POINT_TOKENS, 128).bfloat16()
    head = model.lm_head
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, deterministic=True):
        together, alone = layer(x), [layer(x[token : token + 1]) for token in range(len(x))]
        logits_together, logits_alone = head(x), head(x[7:8])
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(logits_together[7:8], logits_alone)


def test_gradients_reach_what_is_calibrated(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path), "int8-group32")
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(3, 320, requires_grad=True)
    given = torch.randn(3, 128)
    layer(x).backward(given)

    assert torch.allclose(x.grad, given @ layer.dequantized().float())
    mlp, dense = model.model.layers[0].mlp, load(tmp_path, "dense", dtype="float32").model.layers[0].mlp
    x = torch.randn(3, 128, requires_grad=True)
    found, expected = (torch.autograd.grad(each(x), x, x)[0] for each in (mlp, dense))
    assert (found - expected).norm() < 0.05 * expected.norm(), "of layers that are asked at once, too"
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="allocated", tp_size=2)
    assert answers(model, plan, random_ids(1, 5), simulate=True)[0].isfinite().all()


def test_ranks_hold_whole_groups(ranks: Pools, tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path), "int4-group32")
    plan = narrowcast.calibrate(load(tmp_path, "dense"), [random_ids(2, 16)], codec="int8-feature", tp_size=4)

    with pytest.raises(InvalidInputError, match=r"whole groups of 32 of the 320 columns .* found columns 0 to 80"):
        narrowcast.attach(model, plan, simulate=True)
    (refused, *_) = ranks(4).run(refusal, tmp_path)
    assert "whole groups of 32" in refused or "KV heads" in refused


def refusal(folder: Path) -> str:
    try:
        load(folder, "int4-group32", split=Split(tp_size=4))
    except InvalidInputError as error:
        return str(error)
    return ""


def test_columns_that_are_no_groups_stay_values(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"intermediate_size": 330})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, "int4-group32")

    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert logits(model, random_ids(1, 5)).isfinite().all()


def test_weights_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    file = saved("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    up = "model.layers.1.mlp.up_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != up}, file)
    with pytest.raises(InvalidInputError, match=f"none for {up}"):
        load(tmp_path, "int4-group32")
    save_file(tensors | {up: tensors[up][:300].clone()}, file)
    with pytest.raises(InvalidInputError, match=r"up_proj.weight of shape \(320, 128\).*found \(300, 128\)"):
        load(tmp_path, "int4-group32")


def test_few_bits_are_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the CPU"):
        loading._check_computes_on_cpu(tmp_path, "cuda")


def test_a_model_in_few_bits_is_neither_saved_nor_turned(tmp_path: Path) -> None:
    engine, model = load_engine(), load(saved("llama", tmp_path), "int8-group32")

    with pytest.raises(InvalidInputError, match="few bits"):
        engine.save(model, tmp_path / "other")
    with pytest.raises(InvalidInputError, match="dense"):
        engine.rotate(model, torch.eye(128))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
def test_activations_are_of_the_dtype_that_the_model_gets(tmp_path: Path, name: str) -> None:
    model, wide = load(saved(name, tmp_path), "int8-group32"), load(tmp_path, "int8-group32", dtype="float32")
    ids = random_ids(1, 6)

    assert logits(model, ids).dtype == torch.bfloat16
    assert logits(wide, ids).dtype == torch.float32
    assert torch.allclose(logits(model.float(), ids), logits(wide, ids), atol=0.02)
