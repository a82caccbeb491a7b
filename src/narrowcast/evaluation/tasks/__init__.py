"""Zero-shot tasks, scored by lm-evaluation-harness: how much accuracy a coded model keeps, how many answers change."""

from narrowcast.evaluation.tasks.answered import AnsweredTasks
from narrowcast.evaluation.tasks.figures import Answer, Comparison, Figures, TaskAnswers, compare, task_items
from narrowcast.evaluation.tasks.harness import TaskSet, answer, load_tasks

__all__ = [
    "Answer",
    "AnsweredTasks",
    "Comparison",
    "Figures",
    "TaskAnswers",
    "TaskSet",
    "answer",
    "compare",
    "load_tasks",
    "task_items",
]
