"""A transfer under way: what drives an algorithm's steps. It starts the exchange that a step yields, waits, and takes
the next step.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor

from narrowcast.collectives.base import Begin, Exchange, Steps, Traffic
from narrowcast.transport import Collectives, TorchDistributedTransport, Transport, Work

MAX_STEPS = 1 << 15  # exchanges of one collective, each of which has a tag of its own: 64 chunks of a ring of 256

Group = dist.ProcessGroup | Transport | None


class Pending:
    """A collective under way, or with `pair` a transfer from one rank to another. `wait()` takes it to its end and
    returns the tensor; calling it again is free.

    A wait first ends the collectives that were started before: ranks may wait in different orders, but none may
    hold back a step that another one needs. Transfers between two ranks hold nothing back, so no wait ends them
    but their own: all that they exchange is under way from the start.
    """

    def __init__(
        self,
        steps: Steps,
        transport: Transport,
        sent: Callable[[Traffic], None] | None = None,
        *,
        pair: tuple[int, int] | None = None,
    ) -> None:
        self._steps, self._transport, self._sent = steps, transport, sent
        self._result: Tensor | None = None
        first = next(steps)  # what is refused here takes no number, so that those of the ranks stay alike
        self._under_way = transport.collectives.under_way
        self._before = tuple(self._under_way)
        self._number, self._tags = _number(transport.collectives, pair)
        if pair is None:
            self._under_way[self._number] = self
        self._work: Work | None = self._follow(first)

    def _follow(self, step: Exchange | Begin | Work) -> Work:
        """Take the steps up to the next wait, and return the Work to wait for."""
        while isinstance(step, Begin):
            step = self._steps.send(self._start(step.exchange))
        return self._start(step) if isinstance(step, Exchange) else step

    def _start(self, exchange: Exchange) -> Work:
        if self._sent is not None:
            self._sent(Traffic(_nbytes(exchange), exchange.num_values))
        try:
            tag = next(self._tags, None)
            assert tag is not None, f"an algorithm takes {MAX_STEPS} steps at most"
            return self._transport.exchange(exchange.sends, exchange.recvs, tag=tag)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        if self._under_way.get(self._number) is self:
            del self._under_way[self._number]

    def wait(self, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """The result; PeerLostError if a rank is lost.

        `meanwhile` is called before each wait, for something else to be computed, and must do that in the same order
        on every rank: no earlier collective is then waited for. If it raises, what travels is waited for, no more.
        """
        if meanwhile is None:
            self._wait_for_those_before()
        try:
            while self._work is not None:
                if meanwhile is not None and not self._spent_on(meanwhile):
                    break
                self._work.wait()
                self._work = self._follow(next(self._steps))
        except StopIteration as end:
            self._work, self._result = None, end.value
        finally:
            self._end()
        assert self._result is not None
        return self._result

    def _wait_for_those_before(self) -> None:
        for number in self._before:
            if number in self._under_way:
                self._under_way[number].wait()

    def _spent_on(self, meanwhile: Callable[[], None]) -> bool:
        """Call `meanwhile`; False if this collective was waited for in it."""
        try:
            meanwhile()
        except Exception:
            if self._work is not None:
                self._work.wait()
            raise
        return self._work is not None


def _number(collectives: Collectives, pair: tuple[int, int] | None) -> tuple[int, Iterator[int]]:
    """A number that both ends count alike, and its tags: even ones for collectives, odd ones between two ranks."""
    if pair is None:
        number = next(collectives.numbers)
        return number, iter(range(2 * number * MAX_STEPS, 2 * (number + 1) * MAX_STEPS, 2))
    number = next(collectives.between[pair])
    return number, iter([4 * number + 1, 4 * number + 3])


def first_tag(transport: Transport) -> int:
    """The tag of a collective's first exchange, the next ones' being 2 more each; those before it are waited for."""
    for pending in tuple(transport.collectives.under_way.values()):
        pending.wait()
    return 2 * next(transport.collectives.numbers) * MAX_STEPS


def transport_of(group: Group) -> Transport:
    """`group` as a transport."""
    return group if isinstance(group, Transport) else TorchDistributedTransport(group)


def finish(pending: Pending, async_op: bool) -> Tensor | Pending:
    """The result of a collective: the tensor, or with `async_op` the Pending of it."""
    return pending if async_op else pending.wait()


def _nbytes(exchange: Exchange) -> int:
    return sum(buffer.nbytes for buffer in exchange.sends if buffer is not None)
