"""One machine beside several that share a model: as long as it fits, more of them should not be slower unnoticed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from narrowcast.engines import Matrix
from narrowcast.perf.compute import Machine, Products
from narrowcast.perf.estimate import CodecEstimate, TimeEstimate
from narrowcast.plan.split import Split

CLEAR = 1.2  # gains below are within what shapes and rates can tell


@dataclass(frozen=True, kw_only=True)
class MachinesEstimate:
    """Milliseconds of a prompt and of a token after it on a number of machines, products and what travels.

    `codec`: by which it travels, each time by the fastest algorithm; "" for one machine. None: its time is unknown.
    `weights_bytes`: that each machine holds.
    """

    machines: int
    codec: str
    weights_bytes: int
    prompt_products_ms: float
    token_products_ms: float
    prompt_ms: float | None
    token_ms: float | None


def one_and_several(
    matrices: Sequence[Matrix], machine: Machine, split: Split, codecs: Sequence[CodecEstimate], input_len: int
) -> list[MachinesEstimate]:
    """One machine, then as many as `split` has ranks, by each of `codecs`, whose `times` are known."""
    alone, shared = (Products.of(matrices, machine, each, input_len) for each in (Split(), split))
    found = [_estimate(1, "", alone, 0.0, 0.0)]
    for each in codecs:
        prompt_ms, token_ms = (_least(each.times, figure) for figure in ("prompt_ms", "token_ms"))
        found.append(_estimate(split.world_size, each.codec, shared, prompt_ms, token_ms))
    return found


def slower(ranks: str, one: str, times_ms: Mapping[str, tuple[float, float]], *, clear: float = 1.0) -> Iterator[str]:
    """A sentence if `ranks` gain nothing over `one`, or less than `clear` times its speed, in any of these.

    `times_ms`: of one and of ranks, by the name of what they do.
    """
    parts = []
    for name, (alone_ms, ranks_ms) in times_ms.items():
        if alone_ms / ranks_ms < clear:
            speed = "slower" if alone_ms < ranks_ms else "hardly faster"
            parts.append(f"{speed} for {name} ({written_ms(ranks_ms)} ms, not {written_ms(alone_ms)})")
    if parts:
        yield f"Than {one}, {ranks} are {' and '.join(parts)}."


def written_ms(ms: float) -> str:
    """Two digits, or all before the point."""
    return f"{ms:.2g}" if ms < 100 else f"{ms:.0f}"


def verdicts(estimates: Sequence[MachinesEstimate], machine: Machine) -> Iterator[str]:
    """Sentences where several machines gain little or nothing over one, and where weights do not fit."""
    one, *several = estimates
    times_ms = {}
    for figure, name in (("prompt_ms", "a prompt"), ("token_ms", "a token after it")):
        known = [ms for each in several if (ms := getattr(each, figure)) is not None]
        if known:
            times_ms[name] = getattr(one, figure), min(known)
    yield from slower(f"{several[0].machines} machines", "one machine", times_ms, clear=CLEAR)
    for each in (one, several[0]):
        if 0 < machine.memory_nbytes < each.weights_bytes:
            held, free = (f"{nbytes / 1e9:.3g} GB" for nbytes in (each.weights_bytes, machine.memory_nbytes))
            machines = "one machine" if each.machines == 1 else f"{each.machines} machines"
            yield f"The weights do not fit into {machines}: {held} in each, for {free} of memory, {machine.origin}."


def _estimate(
    machines: int, codec: str, products: Products, prompt_ms: float | None, token_ms: float | None
) -> MachinesEstimate:
    computed_ms = 1e3 * products.prompt_s, 1e3 * products.token_s
    return MachinesEstimate(
        machines=machines,
        codec=codec,
        weights_bytes=products.held_nbytes,
        prompt_products_ms=computed_ms[0],
        token_products_ms=computed_ms[1],
        prompt_ms=None if prompt_ms is None else computed_ms[0] + prompt_ms,
        token_ms=None if token_ms is None else computed_ms[1] + token_ms,
    )


def _least(times: Sequence[TimeEstimate], figure: str) -> float | None:
    return min((known for each in times if (known := getattr(each, figure)) is not None), default=None)
