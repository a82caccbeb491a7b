"""The judge of plans: the KL divergence that they cost, on text that they were not made from."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn

from narrowcast.attaching import attach
from narrowcast.calibration.observing import observed
from narrowcast.engines import engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, tell
from narrowcast.scores import kl_nats, log_probs
from narrowcast.transport import transports_of


class Judge:
    """Judges plans for `model` as it is or would be split, on sequences of token ids [T].

    The reference is the same split with exact sums, so that ranks and a whole model judge alike.
    """

    def __init__(self, model: nn.Module, split: Split, sequences: Sequence[Tensor]) -> None:
        self._model, self._split = model, split
        self._batches = [ids[None] for ids in sequences]

    @cached_property
    def _reference(self) -> list[Tensor]:
        with observed([], self._model, self._split):
            return [log_probs(self._model, ids) for ids in self._batches]

    def kl(self, plan: Plan, *, algorithm: str = "auto") -> float:
        """Mean over tokens, in nats; on all ranks of a split model the first one's."""
        tell(Progress("judging a plan"))
        real, reference = engine_of(self._model).split_of(self._model) != Split(), self._reference
        attached = attach(self._model, plan, simulate=not real, algorithm=algorithm)
        with evaluating(self._model), attached:
            found = [log_probs(self._model, ids) for ids in self._batches]
        tokens = [kl_nats(*pair).flatten() for pair in zip(reference, found, strict=True)]
        kl = sum(each.sum().item() for each in tokens) / sum(map(len, tokens))
        if real:
            for transport in transports_of(engine_of(self._model).groups(self._model)):
                kl = kl if transport is None else float(transport.share(repr(kl), "judging a plan")[0])
        return kl
