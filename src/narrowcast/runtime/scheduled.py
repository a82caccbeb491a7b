"""A decoder layer, on a rank or whole, run as it was recorded."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowcast.collectives.pending import first_tag
from narrowcast.runtime.attention import NOWHERE, Place, place_of
from narrowcast.runtime.schedules import NotRecordableError, Recorder

if TYPE_CHECKING:
    from narrowcast.runtime.communicator import Communicator

Attended = tuple[Place, Place, int, Place, int]  # keys, values, how many; the mask, and its stride


_one_at_a_time = threading.Lock()


@contextmanager
def recording(wires: "Communicator | None") -> Iterator[Recorder]:
    """Record what runs on this thread, with the sums of `wires`, if any."""
    recorder = Recorder()
    with _one_at_a_time:
        if wires is not None:
            wires.recorder = recorder
        try:
            with recorder.recording():
                yield recorder
        finally:
            if wires is not None:
                wires.recorder = None


class Scheduled:
    """All that `recorder` saw of a layer whose sums are those of `wires`, from hidden states `x` to `out`, [B, T, E].

    `turns`: cosines and sines of the tokens' places. NotRecordableError if it cannot be done again. One call at a time,
    as results in between live on: `lock`.
    """

    def __init__(
        self, wires: "Communicator | None", recorder: Recorder, x: Tensor, out: Tensor, turns: Sequence[Tensor]
    ) -> None:
        self.lock = threading.Lock()
        self._wires, self._sums = wires, recorder.sums
        self._num_tokens, self._num_features = x.shape[:-1].numel(), x.shape[-1]
        recorder.check()
        if type(out) is not Tensor or out.shape != x.shape or not out.is_contiguous():
            raise NotRecordableError("something else than hidden states comes out")
        lost = [each for each in recorder.residues[:1] if each is not None]
        if any(each is not recorder.residues[0] for each in recorder.residues):
            raise NotRecordableError("sums that do not share what was lost")
        if not self._sums and wires is not None:
            raise NotRecordableError("no sums")
        self._steps = recorder.steps([x, out, *turns, *lost, *recorder.stats])

    @property
    def due(self) -> bool:
        """True where a sum of the layer is to be sampled, which runs by steps."""
        sites = None if self._wires is None else self._wires.sites
        return sites is not None and sites.samples and any(sites.counters(each.site).due for each in self._sums)

    def run(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, turns: Sequence[Tensor]) -> Tensor:
        """The layer's hidden states; new tokens go into the last places of `keys` and `values` [B, G, C, D].

        `mask`: bool [B or 1, 1, 1, C], where there was one when the layer was recorded. Raises as the sums do.
        """
        out = torch.empty_like(x)
        moving = [x.data_ptr(), out.data_ptr(), turns[0].data_ptr(), turns[1].data_ptr()]
        attended = place_of(keys), place_of(values), keys.shape[2], *_place_of_mask(mask, len(x))
        if self._wires is None:
            self._steps.run(moving, *attended, [], 0.0)
        else:
            self._run_with_sums(self._wires, moving, attended, x.device)
        return out

    def _run_with_sums(
        self, wires: "Communicator", moving: list[int], attended: Attended, device: torch.device
    ) -> None:
        transport, residue = self._sums[0].call.transport, None
        stats, tags = [], []
        for each in self._sums:
            counters = wires.sites.counters(each.site)
            counters.count(self._num_tokens, each.way, each.sent, each.itemsize)
            stats.append(counters.stats.data_ptr())
            tags.append(first_tag(transport))
            residue = wires.residue(each.site, self._num_tokens, self._num_features, device)
        lost = [] if residue is None else [residue.data_ptr()]
        try:
            outcome = self._steps.run(moving + lost + stats, *attended, tags, transport.timeout_s)
            if outcome is not None:
                raise transport.failed(outcome)
        except BaseException:
            wires.forget([each.call for each in self._sums])
            raise


def _place_of_mask(mask: Tensor | None, num_sequences: int) -> tuple[Place, int]:
    if mask is None:
        return NOWHERE, 0
    return (mask.data_ptr(), mask.stride(0) if len(mask) == num_sequences else 0, 0, 0), mask.stride(3)
