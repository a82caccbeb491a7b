"""The algorithms by name, and the choice among them: one pure function of what every rank knows."""

from collections.abc import Sequence
from itertools import chain

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Algorithm, Hops
from narrowcast.collectives.hierarchical import HIERARCHICAL
from narrowcast.collectives.one_shot import ONE_SHOT
from narrowcast.collectives.two_shot import TWO_SHOT
from narrowcast.errors import InvalidInputError

# Those that any ranks can run, and those that must be told the ranks of each node.
ALGORITHMS: dict[str, Algorithm] = {"one_shot": ONE_SHOT, "two_shot": TWO_SHOT}
NODE_ALGORITHMS: dict[str, Algorithm] = {"hierarchical": HIERARCHICAL}

FALLBACK = "one_shot"  # which can run on any tensor

# The codecs of a sum, by hop.
HOPS = {
    "partial": "the partial sums",
    "reduced": "the reduced sum, which travels again",
    "between": "the sums of nodes",
}


def choose(algorithm: str, hops: Hops, num_tokens: int, num_features: int, world_size: int) -> str:
    """The algorithm to run: "auto" takes hierarchical where there are nodes and a codec for what travels between
    them, one_shot between two ranks, and otherwise the one whose ranks send the fewest bytes, one_shot where they are
    equal. (Between two ranks two_shot could save bytes only where the sum has fewer bits than what is summed.)

    Where another has neither a token nor a feature for every rank that adds up, one_shot runs in its place.
    """
    check_algorithm(algorithm, hops.codecs, hops.groups)
    # With a token for every rank or more, all that is sent grows in proportion to the tokens.
    shape = min(num_tokens, world_size), num_features
    if algorithm != "auto":
        return algorithm if named(algorithm).sent(hops, *shape, 0, world_size) else FALLBACK
    for name, each in NODE_ALGORITHMS.items():
        if each.sent(hops, *shape, 0, world_size):
            return name
    if world_size == 2:
        return FALLBACK
    totals = {name: _total_nbytes(each, hops, *shape, world_size) for name, each in ALGORITHMS.items()}
    return min((name for name in totals if totals[name] is not None), key=lambda name: totals[name] or 0)


def _total_nbytes(algorithm: Algorithm, hops: Hops, num_tokens: int, num_features: int, world_size: int) -> int | None:
    sent = [algorithm.sent(hops, num_tokens, num_features, rank, world_size) for rank in range(world_size)]
    return None if None in sent else sum(each.nbytes for each in sent if each is not None)


def named(algorithm: str) -> Algorithm:
    """The algorithm of that name."""
    return (ALGORITHMS | NODE_ALGORITHMS)[algorithm]


def check_name(algorithm: str) -> None:
    """InvalidInputError unless `algorithm` is known."""
    if algorithm not in ("auto", *ALGORITHMS, *NODE_ALGORITHMS):
        raise InvalidInputError(
            "algorithm",
            expected=f"{', '.join(('auto', *ALGORITHMS, *NODE_ALGORITHMS))}",
            found=repr(algorithm),
            remedy="Choose one of them.",
        )


def check_algorithm(algorithm: str, codecs: Sequence[Codec], groups: Sequence[Sequence[int]] = ()) -> None:
    """InvalidInputError unless `algorithm` is known, and has the codecs and the groups that it needs."""
    check_name(algorithm)
    if algorithm == "auto":
        return
    chosen = named(algorithm)
    if chosen.needs_groups and not groups:
        raise InvalidInputError(
            algorithm,
            expected="the ranks of each node",
            found="none",
            remedy="Choose another algorithm, or name them: calibrate --nnodes, all_reduce(groups=[[0, 1], [2, 3]]).",
        )
    if len(codecs) < chosen.num_hops:
        needed = dict(list(HOPS.items())[: chosen.num_hops])
        raise InvalidInputError(
            algorithm,
            expected=f"codecs for {', for '.join(needed.values())}",
            found=f"{len(codecs)}",
            remedy=f"Pass all, codec=({', '.join(needed)}), as `plan.sites[name].codecs` holds them.",
        )


def checked_hops(codec: Codec | Sequence[Codec], world_size: int, groups: Sequence[Sequence[int]] = ()) -> Hops:
    """The codecs by hop, and the nodes. A single codec without calibrated sources serves all hops.

    InvalidInputError for a codec that does not fit, and for `groups` that are no partition of the ranks.
    """
    codecs: list[Codec] = list(codec) if isinstance(codec, Sequence) else [codec]
    if not all(isinstance(hop, Codec) for hop in codecs):
        raise InvalidInputError(
            "codec",
            expected="a codec, or several by hop, (partial, reduced), such as `plan.sites[name].codecs`",
            found=repr(codec),
            remedy="Make codecs by calibration, or from a preset's recipe: PRESETS[name].codec(ranges).",
        )
    if not codecs or codecs[0].num_sources not in (None, world_size):
        raise InvalidInputError(
            "codec",
            expected=f"one calibrated for {world_size} ranks",
            found=f"{codecs[0].num_sources}" if codecs else "none",
            remedy="Calibrate with this tp_size.",
        )
    if len(codecs) == 1 and codecs[0].num_sources in (None, 1):
        codecs *= 3
    if len(codecs) > 1 and codecs[1].num_sources not in (None, 1):
        raise InvalidInputError(
            "codec of the reduced sum",
            expected="one with a single source",
            found=f"{codecs[1].num_sources}",
            remedy="Pass codec=(partial, reduced), as `plan.sites[name].codecs` holds them.",
        )
    nodes = checked_groups(groups, world_size)
    if nodes and len(codecs) > 2 and codecs[2].num_sources not in (None, len(nodes)):
        raise InvalidInputError(
            "codec between nodes",
            expected=f"one with {len(nodes)} sources, a node each",
            found=f"{codecs[2].num_sources}",
            remedy="Calibrate it on the sums of these groups.",
        )
    return Hops(tuple(codecs), nodes)


def checked_groups(groups: Sequence[Sequence[int]], world_size: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each node, ascending: partial sums are added up in rank order."""
    well_formed = all(isinstance(group, Sequence) and len(group) > 0 for group in groups)
    if groups and not (well_formed and sorted(chain(*groups)) == list(range(world_size))):
        raise InvalidInputError(
            "groups",
            expected=f"each rank from 0 to {world_size - 1} in one group",
            found=f"{groups}",
            remedy="List the ranks of every node, such as groups=[[0, 1], [2, 3]].",
        )
    return tuple(tuple(sorted(group)) for group in groups)


def source_of(codec: Codec, rank: int, world_size: int) -> int:
    """The source under which `rank` codes what it passes on: its own, or the only one of a codec of reduced sums."""
    checked = codec.num_sources
    if checked not in (None, 1, world_size):
        raise InvalidInputError(
            "codec",
            expected=f"one calibrated for {world_size} ranks, or for the sum",
            found=f"{checked} sources",
            remedy="Calibrate with this tp_size.",
        )
    return 0 if checked == 1 else rank
