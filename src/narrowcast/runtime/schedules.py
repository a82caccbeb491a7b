"""Schedules: what a layer did for a few tokens, recorded as it ran, and done again for others in one native call.

Of a decoding step on ranks a fifth was Python and PyTorch's dispatcher (decision 38). So operators, sums, and what
PyTorch computes value by value are noted once, with the addresses of their tensors. Results in between live on with the
schedule; tensors that are others in each call are told of by their addresses then. Whatever else runs is noticed, and
such a layer is not recorded.

Shapes: T tokens, E features.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.codecs.kernels import cpu
from narrowcast.collectives.base import Sent
from narrowcast.collectives.one_call import OneCall
from narrowcast.plan.decisions import Choice
from narrowcast.runtime.reports import Way

if TYPE_CHECKING:
    from narrowcast import _native

OPERATORS = {"attend", "rms_norm", "multiply_packed", "multiply_bf16"}  # of the compiled module, and of its Schedule
SILENT = {"limit_threads", "packed"}  # functions whose effect stays

_aten = torch.ops.aten
_COPY, _ADD, _MULTIPLY = 0, 1, 2  # `How` of csrc/decode/decode.h
_ROOM = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}
# Values: two of PyTorch's vectors, which it takes at once; as many as no two threads of it share.
_VECTORS, _GRAIN = 64, 1 << 14
_FUNCTIONS = {_aten.silu.default, _aten.relu.default, _aten.gelu.default}

Place = tuple[int, int, int, int]
Rows = tuple[int, int, int, int, int]
_NOTHING: Rows = (0, 0, 0, 0, 0)


class NotRecordableError(Exception):
    """Something that ran cannot be done again in one call; says what."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A sum in a schedule: its site and way, what it sends, values of `itemsize` bytes, and the call that makes it."""

    site: str
    way: Way
    sent: Sent
    itemsize: int
    call: OneCall


class Recorder(TorchDispatchMode):
    """Notes what runs inside of it on this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums: list[Summed] = []
        self.residues: list[Tensor | None] = []  # of the sums, as their stats
        self.stats: list[Tensor] = []
        self._noted: list[tuple[str, tuple[Any, ...]]] = []
        self._kept: list[Tensor] = []
        self._zeros: list[Tensor] = []
        self._missed, self._thread = "", threading.get_ident()
        self._counted: list[tuple[str, Way, Sent, int]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note PyTorch's operators and those of the compiled module."""
        with ExitStack() as stack:
            stack.enter_context(cpu.noted(self._note))
            stack.enter_context(self)
            yield

    def miss(self, what: str) -> None:
        """Something runs that no schedule can have."""
        self._missed = self._missed or what

    def count(self, site: str, choice: Choice, sent: Sent, itemsize: int) -> None:
        """A sum at `site` begins, which sends so much."""
        self._counted.append((site, Way(*choice, "layer"), sent, itemsize))

    def add_up(self, call: OneCall | None, x_TE: Tensor, y_TE: Tensor, residue: Tensor | None, stats: Tensor) -> None:
        """The sum that has begun was made by `call`; None if by steps."""
        if call is None:
            return self.miss("a sum by steps")
        self.sums.append(Summed(*self._counted[-1], call))
        self.residues.append(residue)
        self.stats.append(stats)
        addresses = (0 if each is None else each.data_ptr() for each in (x_TE, y_TE, residue, stats))
        self._noted.append(("sum", (call.steps, *addresses)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if any(isinstance(each, AsyncCollectiveTensor) for each in args):  # without memory of its own
            self.miss(str(func))
            return found
        if func.is_view and _is_view(found, args[0]):  # those of inference mode copy where they must
            return found
        if func in _ROOM or func is _aten.zeros.default:
            self._kept.append(found)
            if func is _aten.zeros.default:
                self._zeros.append(found)
        elif combined := _combined(func, args, kwargs, found):
            self._kept.append(found)
            self._noted += combined
        else:
            self.miss(str(func))
        return found

    def _note(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if threading.get_ident() != self._thread or name in SILENT:
            return function
        if name not in OPERATORS:
            self.miss(name)

        def run(*arguments: Any) -> Any:
            self._noted.append((name, arguments))
            return function(*arguments)

        return run

    def check(self) -> None:
        """NotRecordableError if something ran that no schedule can have."""
        if self._missed:
            raise NotRecordableError(self._missed)
        if len(self.sums) != len(self._counted):
            raise NotRecordableError("a sum that is not ours")

    def steps(self, moving: Sequence[Tensor]) -> "_native.Schedule":
        """All that ran, `moving` being tensors that are others in each call. NotRecordableError if it cannot."""
        self.check()
        if sum(name == "attend" for name, _ in self._noted) != 1:
            raise NotRecordableError("no attention, or several")
        if any(all(each.data_ptr() != other.data_ptr() for other in moving) for each in self._zeros):
            raise NotRecordableError("zeros that something is added to")
        assert cpu.native is not None
        ranges = [(each.data_ptr(), each.nbytes) for each in moving]
        steps: _native.Schedule = cpu.native.Schedule(ranges, (self._kept, self._noted))
        for name, arguments in self._noted:
            getattr(steps, name)(*arguments)
        return steps


def _combined(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], found: Any
) -> list[tuple[str, tuple[Any, ...]]]:
    """Native operators that compute the same bits as one of PyTorch's, with their arguments; none if there are none."""
    if func in (_aten.add.Tensor, _aten.mul.Tensor) and kwargs.get("alpha", 1) == 1 and len(args) == 2:
        if all(isinstance(each, Tensor) and each.shape == found.shape for each in args):
            a, b, out = _rows(args[0]), _rows(args[1]), _rows(found)
            how = _ADD if func is _aten.add.Tensor else _MULTIPLY
            return [("combine", (how, a, b, out))] if a and b and out else []
    elif func in _FUNCTIONS and args[0].dtype is torch.bfloat16:
        x, out, table = _rows(args[0]), _rows(found), _table(func, tuple(kwargs.items()), _is_in_vectors(args[0]))
        return [("look_up", (table.data_ptr(), x, out))] if x and out and table is not None else []
    elif func is _aten.clone.default or _is_cast(func, kwargs):
        return _copies(args[0], found)
    return []


def _is_cast(func: Any, kwargs: Mapping[str, Any]) -> bool:
    return (func is _aten._to_copy.default and kwargs.keys() == {"dtype"}) or (func is _aten.to.dtype and not kwargs)


def _copies(x: Tensor, out: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """A copy, sequence by sequence where not all rows lie at one distance."""
    pairs = [(x, out)] if _rows(x) else zip(x.unbind(), out.unbind(), strict=True) if x.dim() > 1 else []
    copies = [(_rows(part), _rows(place)) for part, place in pairs]
    if not all(part and place for part, place in copies):
        return []
    return [("combine", (_COPY, part, _NOTHING, place)) for part, place in copies]


def _is_view(found: Any, x: Tensor) -> bool:
    """True if all that was found lies where `x` does."""
    storage = x.untyped_storage().data_ptr()
    parts = [found] if isinstance(found, Tensor) else found
    return all(part.untyped_storage().data_ptr() == storage for part in parts)


def _rows(x: Tensor) -> Rows | None:
    """A tensor [..., E] in BF16 or FP32 as rows without gaps in them, if it is one."""
    if not x.is_cpu or x.dim() == 0 or x.stride(-1) != 1 or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        x_TE = x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
    return x.data_ptr(), cpu.DTYPES[x.dtype], x_TE.stride(0), *x_TE.shape


def _is_in_vectors(x: Tensor) -> bool:
    """True if PyTorch computes a function of each value of `x` in whole vectors, on one thread."""
    return x.shape[-1] % _VECTORS == 0 and x.numel() <= _GRAIN


@functools.cache
def _table(func: Any, options: tuple[tuple[str, Any], ...], in_vectors: bool) -> Tensor | None:
    """The values of a function of BF16 [65536], by the bits of the argument, as PyTorch computes them in vectors.

    None where it computes them otherwise one by one, unless all are computed in vectors.
    """
    arguments = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = torch.cat([func(part, **dict(options)) for part in arguments.split(_GRAIN)])
    if in_vectors:
        return table
    apart = torch.stack([arguments, arguments], dim=1)[:, 0]
    alone = func(apart, **dict(options)).contiguous()
    same = (table.view(torch.int16) == alone.view(torch.int16)) | (table.isnan() & alone.isnan())
    return table if bool(same.all()) else None
