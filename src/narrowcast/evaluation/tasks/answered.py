"""Answers of the uncompressed model and the coded one to the same tasks, and their report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from narrowcast.evaluation.tasks.figures import Comparison, TaskAnswers, compare, task_items
from narrowcast.evaluation.tasks.harness import TaskSet

MOST_ITEMS = 2000  # in all, up to which a report lists every answer


@dataclass(frozen=True)
class AnsweredTasks:
    """The tasks that were asked, and each model's answers by task."""

    asked: TaskSet
    uncompressed: Mapping[str, TaskAnswers]
    coded: Mapping[str, TaskAnswers]

    @property
    def comparison(self) -> Comparison:
        """Figures of each task and of all."""
        return compare(self.uncompressed, self.coded)

    def to_json(self) -> dict[str, Any]:
        """Figures as JSON values, and the answers too where they are few."""
        comparison = self.comparison
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
        return {
            "tasks": list(self.asked.names),
            "limit": self.asked.limit,
            "by_task": by_task,
            "mean": asdict(comparison.mean),
            "items": items if comparison.mean.num_items <= MOST_ITEMS else None,
        }
