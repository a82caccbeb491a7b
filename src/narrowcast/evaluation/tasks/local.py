"""Tasks from JSONL files as llm-foundry lays them out, made into tasks of lm-evaluation-harness.

Prompts are llm-foundry's, and for ARC and PIQA also the harness's own; `|` is where the scored text begins:

    arc_easy, arc_challenge, piqa, boolq   QUERY\\nAnswer:| CHOICE
    hellaswag                              QUERY| CHOICE
    winogrande                             CONTEXT_OPTION| CONTINUATION
    lambada_openai                         CONTEXT| CONTINUATION
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrowcast.errors import InvalidInputError

Row = Mapping[str, Any]

LISTS = "choices", "context_options"


MEAN = {"aggregation": "mean", "higher_is_better": True}
LIKELIEST = {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": [{"metric": "acc", **MEAN}]}
GREEDY = {
    "output_type": "loglikelihood",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", **MEAN},
    ],
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a file's rows must hold, what of it the harness asks, and how it scores the answers."""

    fields: tuple[str, ...]
    form: Callable[[Row], dict[str, Any]]
    scoring: Mapping[str, Any] = field(default_factory=lambda: LIKELIEST)


def _question(row: Row) -> dict[str, Any]:
    return {**_beginning(row), "text": f"{row['query'].rstrip()}\nAnswer:"}


def _beginning(row: Row) -> dict[str, Any]:
    choices = [choice.strip() for choice in row["choices"]]
    return {"text": row["query"].rstrip(), "choices": choices, "target": row["gold"]}


def _contexts(row: Row) -> dict[str, Any]:
    """Where the text is a number, the harness takes the choices for contexts of one target."""
    return {"text": row["gold"], "choices": row["context_options"], "target": row["continuation"].strip()}


def _last_word(row: Row) -> dict[str, Any]:
    return {"text": row["context"].rstrip(), "target": f" {row['continuation'].strip()}"}


QUESTION = Layout(fields=("query", "choices", "gold"), form=_question)
BEGINNING = Layout(fields=("query", "choices", "gold"), form=_beginning)
CONTEXTS = Layout(fields=("context_options", "continuation", "gold"), form=_contexts)
LAST_WORD = Layout(fields=("context", "continuation"), form=_last_word, scoring=GREEDY)

LOCAL_TASKS: Mapping[str, Layout] = {
    "arc_easy": QUESTION,
    "arc_challenge": QUESTION,
    "piqa": QUESTION,
    "boolq": QUESTION,
    "hellaswag": BEGINNING,
    "winogrande": CONTEXTS,
    "lambada_openai": LAST_WORD,
}


def local_task(name: str, folder: Path) -> Any:
    """The harness's task `name` on the items of its file in `folder`; InvalidInputError for what is not so laid out."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    if name not in LOCAL_TASKS:
        raise InvalidInputError(
            f"task {name}",
            expected=f"one of {', '.join(LOCAL_TASKS)}",
            found="a task whose files narrowcast does not know",
            remedy="Without --tasks-data, the harness's own tasks of any name are taken from the hub.",
        )
    layout = LOCAL_TASKS[name]
    items = datasets.Dataset.from_list([layout.form(row) for row in _rows(_file(name, folder), layout.fields)])
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": items},
            "test_split": "test",
            "doc_to_text": "text",
            "doc_to_target": "target",
            **layout.scoring,
        }
    )


def _file(name: str, folder: Path) -> Path:
    """NAME.jsonl, or else the one file that begins so, as in NAME_validation.jsonl."""
    found = sorted(folder.glob(f"{name}.jsonl")) or sorted(folder.glob(f"{name}_*.jsonl"))
    if len(found) != 1:
        raise InvalidInputError(
            f"task {name}",
            expected=f"one file {folder / name}.jsonl or {name}_*.jsonl",
            found=", ".join(path.name for path in found) or "none",
            remedy="Pass the folder of the tasks' JSONL files.",
        )
    return found[0]


def _rows(path: Path, fields: tuple[str, ...]) -> list[Row]:
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [_row(line, fields, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, fields: tuple[str, ...], where: str) -> Row:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and _is_sound(row, fields):
            return row
    raise InvalidInputError(
        where,
        expected=f"a JSON object with {', '.join(fields)}",
        found=line[:60].decode(errors="replace") or "nothing",
        remedy="gold counts the choices from 0; all else is text.",
    )


def _is_sound(row: Row, fields: tuple[str, ...]) -> bool:
    if not row.keys() >= set(fields):
        return False
    if any(isinstance(row[name], list) != (name in LISTS) for name in fields):
        return False
    choices = [text for name in LISTS if name in fields for text in row[name]]
    texts = [row[name] for name in fields if name != "gold" and name not in LISTS]
    in_range = "gold" not in fields or (type(row["gold"]) is int and 0 <= row["gold"] < len(choices))
    return in_range and all(isinstance(text, str) and text.strip() for text in texts + choices)
