"""Figures of two models' answers to the same items: accuracy kept, answers changed, each with its 95 % interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from narrowcast.errors import InvalidInputError
from narrowcast.scores import Interval

Z = NormalDist().inv_cdf(0.975)  # two-sided 95 %


class Answer(NamedTuple):
    """The choice that a model took to be likeliest (0, 1, ...; of a single text: 1 if it says it), and if it is right.

    Whether it is right is the harness's `acc`.
    """

    chosen: int
    correct: bool


@dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """One model's answers to a task's items, in their order.

    `num_truncated`: items too long for the model's context, which lost their beginning. `perplexity`: of the target
    texts, where the task reports that (LAMBADA).
    """

    items: Sequence[Answer]
    num_truncated: int = 0
    perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A coded model beside the uncompressed one, on the same items.

    `kept_percent` is 100 * accuracy / uncompressed accuracy, None where the uncompressed model has nothing right; its
    interval is the delta method's, for a ratio of two means over the same items, None for a task of one item.
    `changed` is the share of items whose chosen answer differs, with Wilson's interval.
    """

    num_items: int
    accuracy_uncompressed: float
    accuracy: float
    kept_percent: float | None
    kept_interval: Interval | None
    changed: float
    changed_interval: Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Figures by task, and of all tasks.

    In `mean`, accuracies are means over tasks, whatever their sizes, and `kept_percent` is the ratio of these means;
    `changed` counts the items of all tasks together.
    """

    tasks: Mapping[str, Figures]
    mean: Figures


def compare(uncompressed: Mapping[str, TaskAnswers], coded: Mapping[str, TaskAnswers]) -> Comparison:
    """Figures of `coded` against `uncompressed`: answers to the same items of the same tasks."""
    plain_sizes, coded_sizes = _sizes(uncompressed), _sizes(coded)
    if plain_sizes != coded_sizes:
        raise InvalidInputError(
            "answers",
            expected="the same items of the same tasks",
            found=f"{plain_sizes} and {coded_sizes}",
            remedy="Let both models answer the same tasks with the same limit.",
        )
    pairs = {name: (task.items, coded[name].items) for name, task in uncompressed.items()}
    return Comparison(
        tasks={name: _figures([pair]) for name, pair in pairs.items()}, mean=_figures(list(pairs.values()))
    )


def task_items(answers: Mapping[str, TaskAnswers]) -> dict[str, list[list[int]]]:
    """{task: [[chosen, correct], ...]} for JSON: with it a later run can be compared item by item."""
    return {name: [[each.chosen, int(each.correct)] for each in task.items] for name, task in answers.items()}


def _sizes(answers: Mapping[str, TaskAnswers]) -> dict[str, int]:
    return {name: len(task.items) for name, task in answers.items()}


def _figures(tasks: Sequence[tuple[Sequence[Answer], Sequence[Answer]]]) -> Figures:
    """Of (uncompressed, coded) answers of one task or more."""
    right = [np.array([[a.correct, b.correct] for a, b in zip(*task, strict=True)], dtype=float) for task in tasks]
    uncompressed, coded = np.mean([of_task.mean(axis=0) for of_task in right], axis=0).tolist()
    changes = [a.chosen != b.chosen for task in tasks for a, b in zip(*task, strict=True)]
    ratio = coded / uncompressed if uncompressed else None
    return Figures(
        num_items=len(changes),
        accuracy_uncompressed=uncompressed,
        accuracy=coded,
        kept_percent=None if ratio is None else 100 * ratio,
        kept_interval=None if ratio is None else _kept_interval(right, ratio, uncompressed),
        changed=sum(changes) / len(changes),
        changed_interval=wilson(sum(changes), len(changes)),
    )


def _kept_interval(tasks: Sequence[np.ndarray], ratio: float, uncompressed: float) -> Interval | None:
    """Of 100 * `ratio`, from each task's [items, 2] right answers (uncompressed, coded).

    To first order the ratio is off by mean(coded - ratio * uncompressed) / uncompressed accuracy, item by item; tasks
    are independent of each other.
    """
    if any(len(right) < 2 for right in tasks):
        return None
    residuals = [right[:, 1] - ratio * right[:, 0] for right in tasks]
    variance = sum(each.var(ddof=1) / len(each) for each in residuals) / len(tasks) ** 2
    half = 100 * Z * math.sqrt(variance) / uncompressed
    return Interval(100 * ratio - half, 100 * ratio + half)


def wilson(count: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share; it stays within 0 and 1, and has a width even where nothing was counted."""
    share, shrink = count / total, 1 + Z**2 / total
    middle = (share + Z**2 / (2 * total)) / shrink
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / shrink
    return Interval(max(0.0, middle - half), min(1.0, middle + half))
