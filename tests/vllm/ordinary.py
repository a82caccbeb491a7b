"""Parts of these tests that our Transformers engine does, which wants another release of Transformers than vLLM has.

Run by the ordinary environment's Python, with a folder: `calibrate FOLDER` makes models and plans there, `random FOLDER
FAMILY` one more of both, `simulate FOLDER MODEL PLAN` scores token sequences.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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
    """Plans of the bundled model for two ranks, and the same model but for one weight."""
    model, tokenizer = load_engine().load(MODEL, dtype="float32"), load_engine().load_tokenizer(MODEL)
    texts = [(ROOT / "README.md").read_text(encoding="utf8")]
    ids = [torch.tensor([tokenizer(text).input_ids[start : start + 128]]) for text in texts for start in (0, 128, 256)]
    narrowcast.calibrate(model, ids, tp_size=2, codec="int4-feature").save(folder / "int4.plan")
    narrowcast.calibrate(model, ids, tp_size=2, codec="int4-group128").save(folder / "group.plan")
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
    ids = [torch.randint(2, 510, (4, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    plan = narrowcast.calibrate(load_engine().load(folder / family), ids, tp_size=2, codec="int4-feature")
    plan.save(folder / f"{family}.plan")


def simulate(folder: Path, model_path: str, plan_path: str) -> None:
    """Log-probabilities of the tokens of `sequences.json`: uncompressed, as the plan says, and without feedback."""
    model, plan = load_engine().load(model_path, dtype="float32"), Plan.load(plan_path)
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
    {"calibrate": calibrate, "random": random, "simulate": simulate}[command](Path(folder), *more)
