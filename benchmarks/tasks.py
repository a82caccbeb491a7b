"""Zero-shot tasks on a real model: accuracy kept and answers changed, by codec.

usage: python benchmarks/tasks.py --model FOLDER --calibrate TEXT --data FOLDER [--codecs NAME ...] [--limit N] [--tp N]
                                  [--json FILE]

TEXT: as frontier.py has it. --data: the JSON lines that examples/tasks reads, hellaswag.jsonl among them. Simulated, in
FP32, by `auto`, which is two_shot among 3 ranks. "BF16": plain BF16 sums; the paper as published is without feedback.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import reporting
from scoring import places

from narrowcast import Plan, attach
from narrowcast.calibration import DEFAULT_CODEC, Observations, observe
from narrowcast.engines import load_engine
from narrowcast.evaluation.tasks import TaskAnswers, TaskSet, answer, compare

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"
PAPER = "arc_easy", "arc_challenge", "winogrande", "hellaswag", "boolq"
TASKS = *PAPER, "lambada_openai", "piqa"
CODECS = {
    "BF16": "bf16",
    "the paper, as published": "int4-feature",
    "the default": DEFAULT_CODEC,
    "3.4 bits": "allocated(bits=3.4)",
    "2.5 bits": "allocated(bits=2.5)",
    "2 bits": "allocated(bits=2)",
}
WITHOUT_FEEDBACK = "BF16", "the paper, as published"

Row = dict[str, Any]


def rows(plain: Mapping[str, TaskAnswers], coded: Mapping[str, TaskAnswers], **about: Any) -> Iterator[Row]:
    """Each task, and their mean."""
    found = compare(plain, coded)
    for name, figures in [*found.tasks.items(), ("mean", found.mean)]:
        yield {**about, "task": name, **asdict(figures)}
    paper = [{name: each[name] for name in PAPER} for each in (plain, coded)]
    yield {**about, "task": "mean of the paper's five", **asdict(compare(*paper).mean)}


def plans(seen: Observations, names: Sequence[str]) -> Iterator[tuple[str, Plan]]:
    for name in names:
        yield name, seen.plan(CODECS[name], feedback=name not in WITHOUT_FEEDBACK, measured=False)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--calibration-sequences", type=int, default=16)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), choices=list(CODECS), metavar="NAME")
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
    for name, plan in plans(observe(model, text, tp_size=asked.tp, moments="diagonal"), asked.codecs):
        with attach(model, plan, simulate=True) as handle:
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
