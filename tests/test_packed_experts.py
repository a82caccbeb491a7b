"""Mixtures of experts whose matrices stay in few bits: of every kind of file, alone and in slices; what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gguf_files
import narrowcast
from gguf_files import Kind
from models import random_ids, save_random
from narrowcast import Plan
from narrowcast.engines import load_engine
from narrowcast.engines.base import Weights
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Split
from narrowcast.weights.arena import PAGE
from narrowcast.weights.experts import PackedExperts
from narrowcast.weights.formats import GroupedCodes, w4a16
from narrowcast.weights.layers import PackedLinear
from ranks import Ranks
from test_packed_models import answers, load, logits, saved
from test_weight_folders import CONFIGS, PACKERS
from test_weights import ERRORS
from transports import needs_mesh

Pools = Callable[[int], Ranks]

FOLDERS = "mixtral", "qwen3-moe"
FILES = "llama-experts", "qwen3moe"
PROJECTIONS = "gate_proj", "up_proj", "down_proj"


def experts_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts")]


def packed_by(method: str, folder: Path) -> Path:
    """A folder whose layers a quantizer has packed, each by itself, in groups of 32."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if re.search(r"_proj\.weight|\.w[123]\.", name)]:
        x_NGk = tensors.pop(name).float().unflatten(1, (-1, 32))
        least, most = x_NGk.aminmax(dim=2)
        scales = ((most - least) / 15).half()
        zeros = (-least / scales).round().clamp(0, 15).to(torch.uint8)
        codes = (x_NGk / scales[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
        parts = PACKERS[method](GroupedCodes(w4a16(32), codes, scales, zeros))
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": CONFIGS[method]}))
    return folder


def a_model(name: str, folder: Path) -> Path:
    """A folder of BF16, one that a quantizer has packed ("mixtral awq"), or a file ("qwen3moe Q4_0")."""
    family, _, how = name.partition(" ")
    if family in FILES:
        folder.mkdir(exist_ok=True)
        gguf_files.write_gguf(folder / "model.gguf", family, Kind[how])
        return folder / "model.gguf"
    return packed_by(how, saved(family, folder)) if how else saved(family, folder)


def values_of(experts: PackedExperts) -> dict[str, Tensor]:
    """What the matrices stand for, as the engine's parameters."""
    gate, up, down = (
        torch.stack([getattr(each, layer).matrix.unpacked().dequantized() for each in experts.experts])
        for layer in PROJECTIONS
    )
    return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


def routed(experts: PackedExperts, num_tokens: int, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts, and weights."""
    num_features = next(experts.experts).down_proj.out_features
    numbers = torch.stack([torch.randperm(experts.num_experts)[:num_chosen] for _ in range(num_tokens)])
    return torch.randn(num_tokens, num_features).bfloat16(), numbers, torch.rand(num_tokens, num_chosen)


def error(experts: PackedExperts, engine: Any, num_tokens: int) -> float:
    """How far outputs are off those of the engine's own experts in FP32, which hold the same values."""
    x_TE, numbers_TK, weights_TK = routed(experts, num_tokens, num_chosen=2)
    with torch.no_grad():
        for key, value in values_of(experts).items():
            getattr(engine, key).copy_(value)
        expected = engine(x_TE.float(), numbers_TK, weights_TK)
        return float((experts(x_TE, numbers_TK, weights_TK) - expected).norm() / expected.norm())


KINDS: list[tuple[str, Weights]] = [
    *((name, weights) for name in FOLDERS for weights in ("int4-group32", "int8-group32")),
    *((f"{name} {method}", "stored") for name in FOLDERS for method in CONFIGS),
    *((f"{name} {kind}", "stored") for name in FILES for kind in ("Q4_0", "Q4_1", "Q8_0", "Q5_0")),
]


@pytest.mark.parametrize(("name", "weights"), KINDS)
def test_experts_are_those_of_transformers(tmp_path: Path, name: str, weights: Weights) -> None:
    """But for the errors of products: SiLU has at most 2.2 times that of gate, as it halves small values; then those of
    up and down. Values are what the file has: of a BF16 folder, rounded to the format.
    """
    path = a_model(name, tmp_path / "model")
    model, engine = load(path, weights), load(path, "dense", dtype="float32")
    packed, dense = experts_of(model), experts_of(engine)

    assert len(packed) == len(dense) > 0
    for ours, theirs in zip(packed, dense, strict=True):
        if weights == "stored":
            assert all(torch.equal(value, getattr(theirs, key)) for key, value in values_of(ours).items())
        activations = next(ours.experts).down_proj.matrix.format.activations
        assert error(ours, theirs, 1) < 4.2 * ERRORS[activations]
        assert error(ours, theirs, 40) < 4.2 * ERRORS[activations]
    routers = [(name, value) for name, value in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == len(packed) and all(value.dtype == torch.bfloat16 for _, value in routers)
    assert load_engine().fingerprint(model) == load_engine().fingerprint(load(path, "dense"))


def test_files_are_what_transformers_unpacks(tmp_path: Path) -> None:
    """Told the size of experts, for which it takes that of a certain model."""
    path = a_model("qwen3moe Q4_0", tmp_path / "model")
    model = load(path, "dense", dtype="float32")
    expected = gguf_files.loaded(path, config=model.config)

    assert dict(model.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", FILES)
def test_files_of_experts_one_by_one_are_the_same(tmp_path: Path, name: str) -> None:
    for folder, one_by_one in (("together", False), ("apart", True)):
        (tmp_path / folder).mkdir()
        gguf_files.write_gguf(tmp_path / folder / "model.gguf", name, Kind.Q4_0, one_by_one=one_by_one)
    together, apart = (load(tmp_path / folder / "model.gguf", "stored") for folder in ("together", "apart"))

    assert torch.equal(logits(together, random_ids(2, 9)), logits(apart, random_ids(2, 9)))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_all_experts_in_one_are_the_same(tmp_path: Path, name: str) -> None:
    expected = load(saved(name, tmp_path), "int4-group32")
    engine = load_engine().load(tmp_path, weights="dense")
    save_file({key: value.contiguous() for key, value in engine.state_dict().items()}, tmp_path / "model.safetensors")

    assert torch.equal(logits(load(tmp_path, "int4-group32"), random_ids(2, 9)), logits(expected, random_ids(2, 9)))


def test_gate_and_up_are_one_matrix_and_may_differ_in_files(tmp_path: Path) -> None:
    path = a_model("llama-experts Q4_0", tmp_path / "model")
    experts = [each for module in experts_of(load(path, "stored")) for each in module.experts]
    assert all(each.fused_gate_up is not None for each in experts)
    others = {"blk.1.ffn_up_exps.weight": Kind.Q8_0, "blk.1.ffn_down_exps.weight": Kind.Q6_K}
    gguf_files.write_gguf(path, "llama-experts", Kind.Q4_0, others)
    model = load(path, "stored")
    (first, *_), (other, *_) = (list(module.experts) for module in experts_of(model))

    assert first.fused_gate_up is not None and other.fused_gate_up is None
    assert [each.matrix.format.num_bits for each in (other.gate_proj, other.up_proj, other.down_proj)] == [4, 8, 8]
    assert error(experts_of(model)[1], experts_of(load(path, "dense", dtype="float32"))[1], 9) < 4.2 * ERRORS["int8"]


@pytest.mark.parametrize("name", ["mixtral", "mixtral awq"])
def test_a_tokens_bits_do_not_depend_on_the_others(tmp_path: Path, name: str) -> None:
    model = load(a_model(name, tmp_path / "model"), "int4-group32")
    experts = experts_of(model)[0]
    x_TE, numbers_TK, weights_TK = routed(experts, 300, num_chosen=2)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, deterministic=True):
        together = experts(x_TE, numbers_TK, weights_TK)
        alone = [experts(*(each[token : token + 1] for each in (x_TE, numbers_TK, weights_TK))) for token in range(300)]

    assert torch.equal(together, torch.cat(alone))


def on_rank(path: Path, weights: Weights, ids: Tensor) -> tuple[Any, ...]:
    plan = Plan.load(path.parent / "plan")
    model = load(path, weights, split=plan.split)
    held = sum(each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLinear))
    return logits(model, ids), held, load_engine().fingerprint(model), *answers(model, plan, ids)


@needs_mesh
@pytest.mark.parametrize("codec", ["int4-feature", "allocated"])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("qwen3-moe", "int8-group32"),
        ("mixtral gptq", "stored"),
        ("llama-experts Q4_0", "stored"),
        ("mixtral gptq", "dense"),
        ("qwen3moe Q8_0", "dense"),
    ],
)
def test_slices_of_experts_on_ranks_are_the_simulated_ones(
    ranks: Pools, tmp_path: Path, name: str, weights: Weights, codec: str
) -> None:
    """With depth feedback, too, and ranks that read the stream as they know it."""
    path = a_model(name, tmp_path / "model")
    model, ids = load(path, weights), random_ids(2, 9)
    plan = narrowcast.calibrate(model, [random_ids(4, 40)], codec=codec, tp_size=2)
    plan.save(path.parent / "plan")
    simulated, whole = answers(model, plan, ids, simulate=True), logits(model, ids)
    held = sum(each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLinear))

    assert plan.feedback.chains and any(name.endswith("mlp.experts") for name in plan.sites)
    for alone, num_bytes, fingerprint, *real in ranks(2).run(on_rank, path, weights, ids):
        assert torch.equal(real[0], simulated[0]) and torch.equal(real[1], simulated[1])
        assert torch.allclose(alone, whole, atol=0.05), "the engine's own sums"
        assert num_bytes <= 0.6 * held
        expected = load_engine().fingerprint(model).samples
        assert all(
            found in (None, expected[name][place])
            for name, each in fingerprint.samples.items()
            for place, found in enumerate(each)
        )


@needs_mesh
def test_whole_experts_are_unpacked_on_ranks(ranks: Pools, tmp_path: Path) -> None:
    path = a_model("mixtral gptq", tmp_path / "model")
    model, ids = load(path, "dense"), random_ids(2, 9)
    plan = narrowcast.calibrate(model, [random_ids(4, 40)], codec="int4-feature", tp_size=2, experts="all_reduce")
    plan.save(path.parent / "plan")
    simulated = answers(model, plan, ids, simulate=True)

    for *_, found, text in ranks(2).run(on_rank, path, "dense", ids):
        assert torch.equal(found, simulated[0]) and torch.equal(text, simulated[1])


def test_matrices_are_read_to_where_they_stay(tmp_path: Path) -> None:
    model = load(saved("mixtral", tmp_path), "int4-group32")
    matrices = [each.matrix for each in model.modules() if isinstance(each, PackedLinear)]
    (place,) = {each.blocks.untyped_storage().data_ptr() for each in matrices}
    joined = [each.fused_gate_up._matrix for module in experts_of(model) for each in module.experts]

    assert {each.blocks.untyped_storage().data_ptr() for each in joined} == {place}
    assert matrices[0].blocks.untyped_storage().nbytes() == sum(each.nbytes for each in matrices) + PAGE


def test_ranks_hold_whole_groups_of_each_expert(tmp_path: Path) -> None:
    model = load(saved("mixtral", tmp_path), "int4-group32")
    plan = narrowcast.calibrate(load(tmp_path, "dense"), [random_ids(2, 16)], codec="int8-feature", tp_size=4)

    with pytest.raises(InvalidInputError, match=r"whole groups of 32 of the .* columns of .*experts\.\*\.down_proj"):
        narrowcast.attach(model, plan, simulate=True)


def test_whole_experts_are_refused_by_name(ranks: Pools, tmp_path: Path) -> None:
    model = load(saved("mixtral", tmp_path), "int4-group32")
    with pytest.raises(InvalidInputError, match="whole experts in few bits"):
        narrowcast.calibrate(model, [random_ids(2, 16)], codec="int8-feature", tp_size=2, experts="all_reduce")
    for told in ranks(2).run(refusal, tmp_path):
        assert "slices of each expert on every rank" in told and "--weights dense" in told


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load(folder, "int4-group32", split=Split(tp_size=2, experts="all_reduce"))
    return str(caught.value)


def test_experts_whose_columns_are_no_groups_stay_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(save_random("qwen3-moe", tmp_path, seed=1), "int4-group32")
    assert isinstance(experts_of(model)[0], PackedExperts)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"moe_intermediate_size": 40}))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        part = tensors[name][:, :40] if "down_proj" in name else tensors[name][:40]
        tensors[name] = part.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    found, expected = load(tmp_path, "int4-group32"), load(tmp_path, "dense")

    (experts,) = experts_of(found)
    assert not isinstance(experts, PackedExperts) and "and 1 more stay in values" in caplog.text
    assert all(
        torch.equal(value, dict(experts_of(expected)[0].named_parameters())[key])
        for key, value in experts.named_parameters()
    )


def test_experts_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    file = saved("mixtral", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    up = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({name: value for name, value in tensors.items() if name != up}, file)
    with pytest.raises(InvalidInputError, match=r"none for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load(tmp_path, "int4-group32")
    save_file(tensors | {up: tensors[up][:300].clone()}, file)
    with pytest.raises(
        InvalidInputError, match=r"experts\.2\.up_proj\.weight of shape \(320, 128\).*found \(300, 128\)"
    ):
        load(tmp_path, "int4-group32")


def test_gradients_pass_through_experts(tmp_path: Path) -> None:
    """As through linear layers: products of what they are given with the values that matrices stand for."""
    experts = experts_of(load(saved("mixtral", tmp_path), "int8-group32"))[0]
    x_TE, numbers_TK, weights_TK = routed(experts, 5, num_chosen=2)
    x_TE = x_TE.float().requires_grad_()
    (found,) = torch.autograd.grad(experts(x_TE, numbers_TK, weights_TK).sum(), x_TE)
    engine = experts_of(load(tmp_path, "dense", dtype="float32"))[0]
    with torch.no_grad():
        for key, value in values_of(experts).items():
            getattr(engine, key).copy_(value)
    (expected,) = torch.autograd.grad(engine(x_TE, numbers_TK, weights_TK).sum(), x_TE)

    assert (found - expected).norm() < 3 * ERRORS["int8"] * expected.norm()


@pytest.mark.parametrize("name", FILES)
def test_config_and_tokenizer_come_with_the_file(tmp_path: Path, name: str) -> None:
    words = ["<s>", "</s>", "a", "b", "ab", *(f"<extra{number}>" for number in range(96))]

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(words)
        writer.add_token_types([3, 3] + [1] * 99)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    gguf_files.write_gguf(tmp_path / "model.gguf", name, Kind.Q4_0, add=add)
    config, expected = load_engine().skeleton(tmp_path / "model.gguf").config, gguf_files.EXPERTS[name]()

    assert config.model_type == expected.model_type and config.num_local_experts == expected.num_local_experts
    assert config.num_experts_per_tok == expected.num_experts_per_tok
    assert load_engine().load_tokenizer(tmp_path / "model.gguf")("ab")["input_ids"] == [4]


def test_files_that_give_tokens_more_experts_than_there_are_are_broken(tmp_path: Path) -> None:
    path = a_model("llama-experts Q4_0", tmp_path / "model")
    used, data = b"llama.expert_used_count", path.read_bytes()
    place = data.index(used) + len(used) + 4  # behind the type of the number
    path.write_bytes(data[:place] + (5).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(InvalidInputError, match="a token's experts among 4, found 5"):
        load(path, "stored")
