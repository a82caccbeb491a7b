"""Parts of these tests that our Transformers engine does, which wants another release of Transformers than vLLM has.

Run by the ordinary environment's Python, with a folder: `calibrate FOLDER` makes models and plans there, `random FOLDER
FAMILY` one more of both, `quantized FOLDER FORM` one in few bits, `adapter FOLDER` one of LoRA, `simulate FOLDER MODEL
PLAN` scores token sequences.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import narrowcast
from narrowcast.engines import load_engine
from narrowcast.plan import Plan

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "gutenberg-7m"

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 32}  # which vLLM's attention knows
EXPERTS = {"num_experts_per_tok": 2}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
FAMILIES = {
    "llama-biased": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SMALL, **HEADS, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, **HEADS),
    "gemma2": lambda: Gemma2Config(**SMALL, **HEADS, **GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, **HEADS, **GEMMA),
    "mixtral": lambda: MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=64),
}


def calibrate(folder: Path) -> None:
    """Plans of the bundled model for two ranks, one for two stages of them, and the same model but for one weight."""
    model, tokenizer = load_engine().load(MODEL, dtype="float32"), load_engine().load_tokenizer(MODEL)
    texts = [(ROOT / "README.md").read_text(encoding="utf8")]
    ids = [torch.tensor([tokenizer(text).input_ids[start : start + 128]]) for text in texts for start in (0, 128, 256)]
    narrowcast.calibrate(model, ids, tp_size=2, codec="int4-feature").save(folder / "int4.plan")
    narrowcast.calibrate(model, ids, tp_size=2, codec="int4-group128").save(folder / "group.plan")
    narrowcast.calibrate(model, ids, tp_size=2, pp_size=2, codec={"sum": "int4-feature"}).save(folder / "stages.plan")
    other = folder / "other"
    shutil.copytree(MODEL, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"] += 0.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})


def random(folder: Path, family: str) -> None:
    """A small random model of a family, and its plan for two ranks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).float()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder / family)
    plan_of_random(folder / family)


def plan_of_random(model: Path, **options: Any) -> None:
    """The plan of a random model, beside it."""
    ids = [torch.randint(2, 510, (4, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    plan = narrowcast.calibrate(load_engine().load(model), ids, tp_size=2, codec="int4-feature", **options)
    plan.save(model.with_suffix(".plan"))


def quantized(folder: Path, form: str) -> None:
    """A small random Llama of weights in few bits, `w8a8`, `w4a16` or `gptq`; a plan of those that our engine reads."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"intermediate_size": 256})
    model = AutoModelForCausalLM.from_config(config).float()
    tensors = {}
    for name, weight in model.state_dict().items():
        values = weight if weight.dim() < 2 else torch.randn(weight.shape) * weight.shape[-1] ** -0.5
        if name.endswith("_proj.weight"):
            stored = {"w8a8": in_8_bits, "w4a16": in_4_bits, "gptq": for_gptq}[form](values)
            tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in stored.items()}
        else:
            tensors[name] = values.bfloat16().contiguous()
    config.quantization_config = QUANTIZED[form]
    config.torch_dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / form)
    save_file(tensors, folder / form / "model.safetensors", {"format": "pt"})
    if form != "w8a8":
        plan_of_random(folder / form)


GROUP = 64


def in_8_bits(weight_NK: Tensor) -> dict[str, Tensor]:
    scale_N1 = weight_NK.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight_NK / scale_N1).round().to(torch.int8), "weight_scale": scale_N1.bfloat16()}


def in_groups(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Values from 0 to 15 [N, K], of which 8 is zero, and scales [N, K / GROUP]."""
    groups_NGE = weight_NK.view(len(weight_NK), -1, GROUP)
    scale_NG = (groups_NGE.abs().amax(-1) / 7).bfloat16()
    values_NGE = (groups_NGE / scale_NG[..., None].float()).round().clamp(-8, 7) + 8
    return values_NGE.view_as(weight_NK).int(), scale_NG


def packed(values: Tensor) -> Tensor:
    """Eight values of the last axis in an int32, the first lowest."""
    shifted = values.view(*values.shape[:-1], -1, 8).long() << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


def in_4_bits(weight_NK: Tensor) -> dict[str, Tensor]:
    values_NK, scale_NG = in_groups(weight_NK)
    return {"weight_packed": packed(values_NK), "weight_scale": scale_NG, "weight_shape": torch.tensor(weight_NK.shape)}


def for_gptq(weight_NK: Tensor) -> dict[str, Tensor]:
    values_NK, scale_NG = in_groups(weight_NK)
    zeros_GN = torch.full(scale_NG.T.shape, 7)  # one less, as its first version has it
    places = torch.arange(weight_NK.shape[1], dtype=torch.int32) // GROUP
    qweight = packed(values_NK).T
    return {"qweight": qweight, "scales": scale_NG.T.half(), "qzeros": packed(zeros_GN), "g_idx": places}


WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False}
IN_8 = {**WEIGHTS, "num_bits": 8, "strategy": "channel"}
TOKENS = {"type": "int", "symmetric": True, "dynamic": True, "num_bits": 8, "strategy": "token"}
IN_4 = {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": GROUP}
COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
QUANTIZED: dict[str, dict[str, Any]] = {
    "w8a8": {
        **COMPRESSED,
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": IN_8, "input_activations": TOKENS}},
    },
    "w4a16": {
        **COMPRESSED,
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": IN_4, "input_activations": None}},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
}


def adapter(folder: Path) -> None:
    """An adapter of the bundled model as peft writes it, on all its layers, and the model with it merged in."""
    shutil.copytree(MODEL, folder / "merged")
    weights = load_file(folder / "merged" / "model.safetensors")
    rank, alpha, parts = 8, 16, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight_NK in weights.items():
        if name.endswith("_proj.weight"):
            (num_rows, num_columns), key = weight_NK.shape, "base_model.model." + name.removesuffix(".weight")
            down = torch.randn(rank, num_columns, generator=generator) * num_columns**-0.5
            up = torch.randn(num_rows, rank, generator=generator) * 0.02
            parts |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            weights[name] = weight_NK.float() + alpha / rank * up @ down
    save_file(weights, folder / "merged" / "model.safetensors", {"format": "pt"})
    (folder / "adapter").mkdir()
    save_file(parts, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    projections = sorted({name.split(".")[-3] for name in parts})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": projections}))


def simulate(folder: Path, model_path: str, plan_path: str) -> None:
    """Log-probabilities of the tokens of `sequences.json`: uncompressed, as the plan says, and without feedback."""
    model, plan = load_engine().load(model_path, dtype="float32"), Plan.load(plan_path)
    plan = replace(plan, model=load_engine().fingerprint(model))  # an adapter may be merged into it
    sequences = json.loads((folder / "sequences.json").read_text())
    found = {"exact": scored(model, sequences)}
    for name, options in {"planned": {}, "without feedback": {"feedback": False}}.items():
        with narrowcast.attach(model, plan, simulate=True, **options):
            found[name] = scored(model, sequences)
    (folder / "simulated.json").write_text(json.dumps(found))


@torch.no_grad()
def scored(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each token but the first."""
    found = []
    for ids in sequences:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder, *more = sys.argv[1:]
    {each.__name__: each for each in (calibrate, random, quantized, adapter, simulate)}[command](Path(folder), *more)
