"""Parts of these tests that our Transformers engine does, which wants another release of Transformers than vLLM has.

Run by the ordinary environment's Python: `ordinary.py calibrate FOLDER` makes models and plans there, `ordinary.py
simulate FOLDER` scores token sequences.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import narrowcast
from narrowcast.engines import load_engine
from narrowcast.plan import Plan

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "gutenberg-7m"


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


def simulate(folder: Path) -> None:
    """Log-probabilities of the tokens of `sequences.json`: uncompressed, as the plan says, and without feedback."""
    model, plan = load_engine().load(MODEL, dtype="float32"), Plan.load(folder / "int4.plan")
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
    {"calibrate": calibrate, "simulate": simulate}[sys.argv[1]](Path(sys.argv[2]))
