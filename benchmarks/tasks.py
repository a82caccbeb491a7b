"""Zero-shot tasks on a real model: accuracy kept and answers changed, by codec.

usage: python benchmarks/tasks.py --model FOLDER --calibrate TEXT --data FOLDER [--codecs NAME ...] [--limit N] [--tp N]
                                  [--json FILE]

TEXT: as frontier.py has it. --data: the JSON lines that examples/tasks reads, hellaswag.jsonl among them. Simulated, in
FP32, by `auto`, which is two_shot among 3 ranks, unless a name says one_shot. "BF16": plain BF16 sums; the paper as
published is without feedback.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import reporting
from scoring import places

from narrowcast import attach
from narrowcast.calibration import DEFAULT_CODEC, observe
from narrowcast.codecs import Recipe
from narrowcast.engines import load_engine
from narrowcast.evaluation.tasks import TaskAnswers, TaskSet, answer, compare

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"
PAPER = "arc_easy", "arc_challenge", "winogrande", "hellaswag", "boolq"
TASKS = *PAPER, "lambada_openai", "piqa"

Row = dict[str, Any]


class Contestant(NamedTuple):
    """A codec, and how it is used."""

    codec: str | Recipe
    feedback: bool = True
    algorithm: str = "auto"


CONTESTANTS = {
    "BF16": Contestant("bf16", feedback=False),
    "the paper, as published": Contestant("int4-feature", feedback=False),
    "the default": Contestant(DEFAULT_CODEC),
    "4.19 bits, one_shot": Contestant("allocated(bits=4.19, algorithm=one_shot)", algorithm="one_shot"),
    "3.4 bits": Contestant("allocated(bits=3.4)"),
    "2.5 bits": Contestant("allocated(bits=2.5)"),
    "2 bits": Contestant("allocated(bits=2)"),
}


def rows(plain: Mapping[str, TaskAnswers], coded: Mapping[str, TaskAnswers], **about: Any) -> Iterator[Row]:
    """Each task, and their mean."""
    found = compare(plain, coded)
    for name, figures in [*found.tasks.items(), ("mean", found.mean)]:
        yield {**about, "task": name, **asdict(figures)}
    paper = [{name: each[name] for name in PAPER} for each in (plain, coded)]
    yield {**about, "task": "mean of the paper's five", **asdict(compare(*paper).mean)}


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--calibration-sequences", type=int, default=16)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--codecs", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="items of each task at most")
    parser.add_argument("--tp", type=int, default=3)
    asked = parser.parse_args()
    engine = load_engine()
    model, tokenizer = engine.load(asked.model, dtype="float32"), engine.load_tokenizer(asked.model)
    text = places(tokenizer, asked.calibrate, asked.calibration_sequences)
    path = asked.json and asked.json.absolute()
    os.chdir(asked.data)  # where the tasks look for their data
    tasks = TaskSet(names=[str(EXAMPLES / f"{name}.yaml") for name in TASKS], limit=asked.limit)
    plain, table = answer(model, tokenizer, tasks), []
    seen = observe(model, text, tp_size=asked.tp, moments="diagonal")
    for name in asked.codecs:
        codec, feedback, algorithm = CONTESTANTS[name]
        plan = seen.plan(codec, feedback=feedback, measured=False)
        with attach(model, plan, simulate=True, algorithm=algorithm) as handle:
            coded = answer(model, tokenizer, tasks)
            bits = handle.report().bits_per_value
        for row in rows(plain, coded, codec=name, bits_per_value=bits):
            table.append(row)
            print(*(f"{value:.5g}" if isinstance(value, float) else value for value in row.values()), flush=True)
        setting = {"model": asked.model.name, "calibrated_on": asked.calibrate.name, "tp_size": asked.tp}
        setting |= {"num_calibration_sequences": len(text), "limit": asked.limit}
        reporting.write(path, **setting, rows=table)  # what is there so far


if __name__ == "__main__":
    main()
