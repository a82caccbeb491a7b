"""Letting lm-evaluation-harness ask a model: it forms the requests and scores them, narrowcast only reads them off."""

import contextlib
import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.evaluation.tasks.figures import Answer, TaskAnswers
from narrowcast.progress import Progress, tell

BATCH_SIZE = 8  # requests; prompts are short, and the harness sorts them by length


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Tasks of the harness: names of its own, or YAML files as it takes them; `limit` items of each at most."""

    names: Sequence[str]
    limit: int | None = None


def load_tasks(tasks: TaskSet) -> dict[str, Any]:
    """The harness's tasks by name. Groups of the harness come as their members.

    InvalidInputError for unknown names, data that are not there, and tasks that are not scored by `acc` over the
    likelihood of texts; MissingDependencyError without lm-eval.
    """
    _check_installed()
    if not tasks.names or len(set(tasks.names)) < len(tasks.names):
        raise InvalidInputError(
            "tasks", expected="each name once", found=", ".join(tasks.names) or "none", remedy="Pass arc_easy, say."
        )
    if tasks.limit is not None and tasks.limit < 1:
        raise InvalidInputError("limit", expected="1 item or more", found=tasks.limit, remedy="Leave it out for all.")
    with _hushed():
        found = _loaded(list(tasks.names))
    for name, task in found.items():
        _check_scored_by_likelihood(name, task)
        task.set_config("num_fewshot", 0)
    return found


def answer(model: nn.Module, tokenizer: Any, tasks: TaskSet) -> dict[str, TaskAnswers]:
    """Answers of `model` by task; with a plan at work, coded. Ranks of a split model all call this, and get the same.

    Log-probabilities are taken in FP32, where the harness would stay in the model's dtype: sums of BF16 ones come in
    steps of up to 0.5, so that answers would tie.
    """
    _check_installed()
    from lm_eval.models.huggingface import HFLM

    class Told(HFLM):  # type: ignore[misc]
        num_batches = 0

        def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
            self.num_batches += 1
            tell(Progress("answering tasks, batch", self.num_batches))
            return cast(Tensor, super()._model_call(*args, **kwargs))

    with _hushed():
        # A model that is passed ready-made is one model to the harness, whatever ranks there are: nothing is sharded.
        lm = Told(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, softmax_dtype="float32")
    return ask(lm, tasks)


def ask(lm: Any, tasks: TaskSet) -> dict[str, TaskAnswers]:
    """Answers by task of a model of the harness's own kind, such as `local-completions`, which asks a server."""
    loaded = load_tasks(tasks)
    import lm_eval

    with _hushed():
        found = lm_eval.evaluate(lm, {"tasks": loaded}, limit=tasks.limit, bootstrap_iters=0)
    return {
        name: TaskAnswers(
            items=[Answer(_chosen(task, sample), bool(sample["acc"])) for sample in found["samples"][name]],
            num_truncated=sum(_is_truncated(lm, sample) for sample in found["samples"][name]),
            perplexity=found["results"][name].get("perplexity,none"),
        )
        for name, task in loaded.items()
    }


def _check_installed() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError("lm-eval", "tasks") from error


def _loaded(names: list[str]) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    own = [name for name in names if not name.endswith(".yaml")]
    manager = _manager(include_defaults=bool(own))
    unknown = sorted(set(own) - set(manager.all_tasks))
    unknown += [name for name in names if name not in own and not Path(name).is_file()]
    if unknown:
        raise InvalidInputError(
            f"task {', '.join(unknown)}",
            expected="names of tasks of lm-eval, or YAML files of one each",
            found="others",
            remedy="Run `lm-eval ls tasks` for a list.",
        )
    try:
        return dict(manager.load(names)["tasks"])
    except (OSError, ValueError, DatasetsError) as error:
        raise InvalidInputError(
            f"tasks {', '.join(names)}",
            expected="data sets that the hub hands out, or files that are there",
            found=str(error).strip().splitlines()[0].rstrip("."),
            remedy="Check the connection, or pass a YAML file whose data_files are on this machine.",
        ) from error


@functools.cache
def _manager(*, include_defaults: bool) -> Any:
    """The manager of tasks, which reads some fourteen thousand files for the harness's own ones."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _check_scored_by_likelihood(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood") or "acc" not in task.aggregation():
        raise InvalidInputError(
            f"task {name}",
            expected="one with metric acc over the likelihood of texts",
            found=f"{task.OUTPUT_TYPE} with {', '.join(task.aggregation())}",
            remedy="Leave it out.",
        )


def _chosen(task: Any, sample: Mapping[str, Any]) -> int:
    """The likeliest choice; for a single text, whether greedy decoding says it."""
    log_likelihoods, greedy = zip(*sample["filtered_resps"], strict=True)
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(greedy[0])
    return int(np.argmax(log_likelihoods[: len(task.doc_to_choice(sample["doc"]))]))


def _is_truncated(lm: Any, sample: Mapping[str, Any]) -> bool:
    """True if the harness cut a request's beginning: a model of N positions reads N tokens to predict the next."""
    return any(len(lm.tok_encode(context + text)) > lm.max_length + 1 for context, text in sample["arguments"])


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No bars and no remarks of the harness: truncation, its only one on items, is counted."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
