"""Small models of many families: each is served, its sums as those of the plain model, or refused by one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    JambaConfig,
    Llama4Config,
    Llama4TextConfig,
    OlmoeConfig,
    PhiConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

import narrowcast
from models import CONFIGS, SMALL, random_ids
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.plan.split import Split
from ranks import Ranks

Pools = Callable[[int], Ranks]

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROUTED = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
PER_LAYER = {"head_dim": 24, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 101, "sliding_window": 6}
FOUR = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}

SERVED: dict[str, Callable[[], Any]] = {
    "cohere": lambda: CohereConfig(**SMALL),
    "granite": lambda: GraniteConfig(**SMALL, embedding_multiplier=12.0, residual_multiplier=0.2),
    "phi": lambda: PhiConfig(**SMALL),
    "gpt-neox": lambda: GPTNeoXConfig(**SMALL),
    "granite-moe": lambda: GraniteMoeConfig(**SMALL, **LOCAL),
    "olmoe": lambda: OlmoeConfig(**SMALL | EXPERTS),
    "phimoe": lambda: PhimoeConfig(**SMALL, **LOCAL),
    "qwen2-moe": lambda: Qwen2MoeConfig(**SMALL | EXPERTS, shared_expert_intermediate_size=32),
    "deepseek-v3": lambda: DeepseekV3Config(**SMALL | ROUTED | GROUPS),
    "jamba": lambda: JambaConfig(**SMALL | LOCAL, attn_layer_offset=1, attn_layer_period=2),
    # Heads of another width, and another number of them, in every other layer; embeddings by layer.
    "gemma4": lambda: Gemma4TextConfig(
        **SMALL | FOUR | PER_LAYER, global_head_dim=32, num_global_key_value_heads=2, attention_k_eq_v=True
    ),
    "gemma4, experts": lambda: Gemma4TextConfig(
        **SMALL | FOUR | PER_LAYER | EXPERTS | {"hidden_size_per_layer_input": 0},
        enable_moe_block=True,
        top_k_experts=2,
    ),
    "gemma3 that sees": lambda: Gemma3Config(text_config=SMALL | {"head_dim": 24}, vision_config=VISION),
}

UNKNOWN = r"expected layers that are summed.* found {} of style '{}' \({}\). This model is not supported yet."
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: GPT2Config(**SMALL, n_embd=96, n_layer=1, n_head=4), "found no row-parallel layer"),
    "falcon": (lambda: FalconConfig(**SMALL), "found no row-parallel layer"),
    "llama4": (
        lambda: Llama4TextConfig(**SMALL | LOCAL, intermediate_size_mlp=64, head_dim=24),
        UNKNOWN.format("model.layers.0.feed_forward.experts", "moe_tp_experts", "Llama4TextExperts"),
    ),
    "llama4 that sees": (
        lambda: Llama4Config(text_config=SMALL | LOCAL | {"head_dim": 24}, vision_config=VISION | SEEING),
        UNKNOWN.format("language_model.model.layers.0.feed_forward.experts", "moe_tp_experts", "Llama4TextExperts"),
    ),
    "aria": (
        lambda: AriaTextConfig(**SMALL, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        UNKNOWN.format("model.layers.0.mlp.experts", "moe_tp_experts", "AriaExperts"),
    ),
    "gpt-oss": (lambda: GptOssConfig(**SMALL | LOCAL), "codec: expected one for logits"),
    "deepseek-v2": (
        lambda: DeepseekV2Config(**SMALL | ROUTED, first_k_dense_replace=1),
        UNKNOWN.format("model.layers.0.self_attn.kv_a_proj_with_mqa", "mla_kv_a_proj", "Linear"),
    ),
}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_config(config).eval()


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_sums_are_those_of_the_plain_model(name: str) -> None:
    model, ids = random_model(SERVED[name]()), random_ids(2, 16)
    plain: Tensor = model(input_ids=ids).logits
    plan = narrowcast.calibrate(model, [ids], tp_size=2, codec="fp8")
    with narrowcast.attach(model, plan, simulate=True, count_only=True):
        summed = model(input_ids=ids).logits
    with narrowcast.attach(model, plan, simulate=True) as handle:
        coded = model(input_ids=ids).logits
    # A sum of two FP32 halves rounds otherwise, by 6e-8, and norms of small streams make that a hundred times larger.
    assert (summed - plain).abs().max() < 1e-4 * plain.abs().max()
    assert not torch.equal(coded, summed)
    assert all(site.wire_bytes > 0 for site in handle.report().sites.values())
    assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str) -> None:
    config, told = REFUSED[name]
    with pytest.raises(InvalidInputError, match=told):
        narrowcast.calibrate(random_model(config()), [random_ids(1, 8)], tp_size=2)


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: setattr(experts, "is_concatenated", False),  # gates and values in turn
        lambda experts: experts.add_module("post_expert_norm", nn.RMSNorm(96)),  # of sums, not of their parts
    ],
)
def test_experts_that_lie_or_end_otherwise_are_refused(change: Callable[[Any], None]) -> None:
    model = random_model(CONFIGS["mixtral"]())
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(InvalidInputError, match=UNKNOWN.format("model.layers.1.mlp.experts", ".*", "MixtralExperts")):
        narrowcast.calibrate(model, [random_ids(1, 8)], tp_size=2)


def logits_on_rank(folder: Path) -> Tensor:
    plan = Plan.load(folder / "plan")
    model: Any = load_engine().load(folder, split=plan.split)
    with torch.no_grad(), narrowcast.attach(model, plan):
        logits: Tensor = model(random_ids(2, 11)).logits
    return logits


@pytest.mark.parametrize("name", ["gemma4", "gemma4, experts"])
def test_real_ranks_of_layers_that_differ_equal_the_simulation(ranks: Pools, tmp_path: Path, name: str) -> None:
    random_model(SERVED[name]()).to(torch.bfloat16).save_pretrained(tmp_path)
    model: Any = load_engine().load(tmp_path)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2, codec="int8-feature")
    plan.save(tmp_path / "plan")
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True):
        expected = model(random_ids(2, 11)).logits
    for found in ranks(2).run(logits_on_rank, tmp_path):
        assert torch.equal(found, expected)


def test_heads_that_differ_by_layer_are_all_counted() -> None:
    model = random_model(SERVED["gemma4"]())
    assert load_engine().obstacle(model, Split(tp_size=2)) == ""
    assert load_engine().obstacle(model, Split(tp_size=4)) == "4 heads, 2 or 4 KV heads: 1 or 2 ranks"
