"""Scores batch by batch: the uncompressed model's forward, then that of each plan on one model in turn."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from narrowcast.attaching import Handle, attach
from narrowcast.plan import Plan
from narrowcast.scores import Score, Scorer, log_probs


@contextmanager
def standing_by(model: nn.Module, plans: Iterable[Plan], **options: Any) -> Iterator[list[Handle]]:
    """Suspended handles of all `plans`, attached with the same `options`, and removed in the end."""
    with ExitStack() as stack:
        handles = []
        for plan in plans:
            handles.append(stack.enter_context(attach(model, plan, **options)))
            handles[-1].suspend()
        yield handles


@contextmanager
def at_work(handle: Handle) -> Iterator[None]:
    """The handle's plan at work on its model."""
    handle.resume()
    try:
        yield
    finally:
        handle.suspend()


def scored(
    model: nn.Module, handles: Sequence[Handle], batches: Iterable[Tensor], reference: Iterable[Tensor | None]
) -> list[Score]:
    """The score of each suspended plan on `batches` of ids [B, T].

    `reference`: the uncompressed model's log-probabilities [B, T, V] of each batch, asked for while no plan is at work;
    None on ranks that do not score, which get no scores.
    """
    scorers = [Scorer() for _ in handles]
    for ids, expected in zip(batches, reference, strict=True):
        for handle, scorer in zip(handles, scorers, strict=True):
            with at_work(handle):
                found = log_probs(model, ids)
            if expected is not None:
                scorer.add(expected, found, ids)
    return [scorer.score() for scorer in scorers if scorer.num_sequences]
