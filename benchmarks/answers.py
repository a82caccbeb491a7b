"""Greedy answers of a real model to ten questions, uncompressed and coded, side by side as a page of Markdown.

usage: python benchmarks/answers.py --model FOLDER --calibrate TEXT [--tp N] > docs/answers.md

TEXT: as frontier.py has it. Simulated, in FP32.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scoring import places
from torch import Tensor, nn

from narrowcast import attach
from narrowcast.calibration import DEFAULT_CODEC, observe
from narrowcast.engines import load_engine
from narrowcast.evaluation.continuations import continuations

QUESTIONS = (
    "Who wrote Romeo and Juliet?",
    "Explain in one sentence why the sky is blue.",
    "Give me two tips for learning a language.",
    "What is the capital of Japan, and what is it known for?",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "What does a compiler do?",
    "Name three animals that live in the desert.",
    "Tell me a short story about a lost dog.",
    "Why do we have seasons?",
)
MAX_NEW_TOKENS = 60
CODECS = {  # those without depth feedback are as published
    "the default": (DEFAULT_CODEC, True),
    "2.5 bits": ("allocated(bits=2.5)", True),
    "2 bits": ("allocated(bits=2)", True),
    "the paper, as published": ("int4-feature", False),
}

HEAD = """# Answers

Greedy answers of {model}, a model of 135 M parameters, to ten questions: uncompressed, and split over {tp} ranks whose
sums travel in fewer bits (simulated, FP32; calibrated on 16 sequences of WikiText-2). What is said before the first
token that differs from the uncompressed answer's is in **bold**. That two texts part says little: plain BF16 sums part
them too, where two tokens are nearly as likely. Read whether what follows makes sense.
`python benchmarks/answers.py --model models/{model} --calibrate wiki.txt` made this page.
"""


def page(model: nn.Module, tokenizer: Any, calibration: Sequence[Tensor], name: str, tp_size: int) -> Iterator[str]:
    asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], **asked).input_ids
        for question in QUESTIONS
    ]
    said = {"uncompressed": continuations(model, prompts, MAX_NEW_TOKENS)}
    seen = observe(model, calibration, tp_size=tp_size, moments="diagonal")
    for contestant, (codec, feedback) in CODECS.items():
        with attach(model, seen.plan(codec, feedback=feedback, measured=False), simulate=True) as handle:
            answers = continuations(model, prompts, MAX_NEW_TOKENS)
            said[f"{contestant}: {handle.report().bits_per_value:.2f} bits a value"] = answers
    yield HEAD.format(model=name, tp=tp_size)
    plain = said["uncompressed"]
    for place, question in enumerate(QUESTIONS):
        yield f"\n## {question}\n\n| | |\n| --- | --- |"
        for contestant, answers in said.items():
            yield f"| {contestant} | {_marked(tokenizer, answers[place], plain[place])} |"


def _marked(tokenizer: Any, ids: Sequence[int], plain: Sequence[int]) -> str:
    """The text in a cell of a table, in bold as far as it is that of `plain`."""
    same = next((place for place, pair in enumerate(zip(ids, plain, strict=False)) if len(set(pair)) > 1), len(ids))
    common, rest = (
        " ".join(tokenizer.decode(part, skip_special_tokens=True).replace("|", "\\|").replace("*", "").split())
        for part in (ids[:same], ids[same:])
    )
    return f"**{common}** {rest}" if common else rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--tp", type=int, default=3)
    asked = parser.parse_args()
    engine = load_engine()
    model, tokenizer = engine.load(asked.model, dtype="float32"), engine.load_tokenizer(asked.model)
    print("\n".join(page(model, tokenizer, places(tokenizer, asked.calibrate, 16), asked.model.name, asked.tp)))


if __name__ == "__main__":
    main()
