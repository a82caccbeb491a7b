"""`narrowcast evaluate --tasks`: zero-shot tasks beside the text that it scores on."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.tasks import (
    LOCAL_TASKS,
    Figures,
    TaskAnswers,
    TaskSet,
    answer,
    compare,
    load_tasks,
    task_items,
)
from narrowcast.launch import is_first_rank

MOST_ITEMS = 2000  # in all, up to which a report lists every answer

Answers = Mapping[str, TaskAnswers]

TasksOption = Annotated[
    str,
    typer.Option(
        "--tasks", metavar="NAME,NAME", help="Zero-shot tasks of lm-evaluation-harness, such as arc_easy,winogrande."
    ),
]
TasksData = Annotated[
    Path | None,
    typer.Option(
        "--tasks-data",
        help=f"Folder of JSONL files as llm-foundry lays them out: {', '.join(LOCAL_TASKS)}; without it, from the hub.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Items of each task at most.")]


def chosen_tasks(names: str, folder: Path | None, limit: int | None) -> TaskSet | None:
    """What the options say, and None without --tasks. Refuses what could not be asked before a model is loaded."""
    if not names:
        _check_nothing_else(folder, limit)
        return None
    stripped = tuple(name.strip() for name in names.split(","))
    tasks = TaskSet(names=tuple(filter(None, stripped)), folder=folder, limit=limit)
    load_tasks(tasks)
    return tasks


def answers(path: str, model: nn.Module, tasks: TaskSet | None) -> Answers:
    """What the model of `path` answers as it is now; nothing without tasks. The first rank shows how far it is."""
    if tasks is None:
        return {}
    progress = is_first_rank() and Console(stderr=True).is_terminal
    return answer(model, load_engine().load_tokenizer(path), tasks, progress=progress)


@dataclass(frozen=True)
class AnsweredTasks:
    """What was asked, and what the uncompressed model and the coded one answered."""

    asked: TaskSet
    uncompressed: Answers
    coded: Answers

    def to_json(self) -> dict[str, Any]:
        """Figures of each task and of all, the answers too where they are few, and the command."""
        comparison = compare(self.uncompressed, self.coded)
        by_task = {
            name: asdict(figures)
            | {
                "num_truncated": self.coded[name].num_truncated,
                "perplexity_uncompressed": self.uncompressed[name].perplexity,
                "perplexity": self.coded[name].perplexity,
            }
            for name, figures in comparison.tasks.items()
        }
        items = {"uncompressed": task_items(self.uncompressed), "coded": task_items(self.coded)}
        found = {
            "data": "hub" if self.asked.folder is None else str(self.asked.folder),
            "limit": self.asked.limit,
            "by_task": by_task,
            "mean": asdict(comparison.mean),
            "items": items if comparison.mean.num_items <= MOST_ITEMS else None,
        }
        return {"command": shlex.join(["narrowcast", *sys.argv[1:]]), "tasks": found}


def print_tasks(tasks: AnsweredTasks) -> None:
    """A row for each task, and one for all."""
    comparison = compare(tasks.uncompressed, tasks.coded)
    headings = "task", "items", "plain", "coded", "kept (95 %)", "changed (95 %)"
    table = Table(*headings, title="zero-shot accuracy, in percent")
    for name, figures in comparison.tasks.items():
        table.add_row(name, *_cells(figures))
    if len(comparison.tasks) > 1:
        table.add_section()
        table.add_row("mean", *_cells(comparison.mean))
    console = Console()
    console.print(table)
    for name, task in tasks.coded.items():
        if task.perplexity is not None:
            console.print(
                f"{name}: perplexity {task.perplexity:.4f}, uncompressed {tasks.uncompressed[name].perplexity:.4f}"
            )
        if task.num_truncated:
            console.print(f"{name}: {task.num_truncated} items were too long for the model and lost their beginning")


def _check_nothing_else(folder: Path | None, limit: int | None) -> None:
    if folder is not None or limit is not None:
        raise InvalidInputError(
            "--tasks-data" if folder is not None else "--limit",
            expected="--tasks with it",
            found="none",
            remedy="Name the tasks, such as --tasks arc_easy,winogrande.",
        )


def _cells(figures: Figures) -> tuple[str, ...]:
    kept, around = figures.kept_percent, figures.kept_interval
    low, high = figures.changed_interval
    return (
        str(figures.num_items),
        f"{100 * figures.accuracy_uncompressed:.1f}",
        f"{100 * figures.accuracy:.1f}",
        "-" if kept is None else f"{kept:.1f}" + ("" if around is None else f" ({around[0]:.0f} to {around[1]:.0f})"),
        f"{100 * figures.changed:.1f} ({100 * low:.0f} to {100 * high:.0f})",
    )
