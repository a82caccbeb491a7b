"""all_to_all, broadcast, send and recv on real ranks: bit for bit what their twins give."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from models import calibrated
from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Pending, simulate
from narrowcast.collectives.base import Exchange, Steps
from narrowcast.errors import InvalidInputError
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks
from test_collectives import partials, same_bits
from transports import GLOO, TCP, Kind, needs_mesh

Pools = Callable[[int], Ranks]
every_world = pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 8])
FP32 = CastCodec(dtype=torch.float32)


def codecs_for(preset: str, world_size: int, num_features: int) -> tuple[Codec, Codec]:
    """One with a source a rank, their scales very different, and one with a single source."""
    x_RTE = torch.stack(partials(world_size, 30, num_features, seed=1))
    return calibrated(preset, x_RTE * 2.0 ** torch.arange(world_size)[:, None, None])


def awkward_counts(world_size: int, seed: int) -> list[list[int]]:
    """Tokens from each rank to each: ragged, many of them none at all."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-3, 6, (world_size, world_size), generator=generator).clamp(min=0)
    return [[int(count) for count in row] for row in counts]


def check_all_to_all(preset: str, kind: Kind) -> None:
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), kind()
    everyone = [[0] * world_size, [1] * world_size]
    matrices = [awkward_counts(world_size, seed) for seed in range(4)] + [[row] * world_size for row in everyone]
    for num_features, counts in zip((70, 5, 1, 33, 70, 64), matrices, strict=True):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [partials(1, sum(row), num_features, dtype=dtype, seed=src)[0] for src, row in enumerate(counts)]
            for codec in codecs_for(preset, world_size, num_features):
                mine = {"send_counts": counts[rank], "recv_counts": [row[rank] for row in counts]}
                found = narrowcast.all_to_all(inputs[rank], codec=codec, group=group, **mine)
                expected = simulate.all_to_all(inputs, codec=codec, send_counts=counts)
                assert same_bits(found, expected[rank]), (num_features, dtype, counts)


@every_world
@pytest.mark.parametrize(
    ("preset", "kind"),
    [("bf16", GLOO), ("int4-feature", GLOO), pytest.param("int4-feature", TCP, marks=needs_mesh)],
)
def test_all_to_all_equals_its_twin(ranks: Pools, world_size: int, preset: str, kind: Kind) -> None:
    ranks(world_size).run(check_all_to_all, preset, kind)


def test_a_tokens_value_does_not_depend_on_where_it_goes() -> None:
    """Nor on who else's tokens go there: its own rank's stays are coded like those that leave."""
    _, codec = codecs_for("int4-feature", 3, 70)
    inputs = partials(3, 3, 70)
    spread = simulate.all_to_all(inputs, codec=codec, send_counts=[[1, 1, 1]] * 3)
    kept = simulate.all_to_all(inputs, codec=codec, send_counts=[[3, 0, 0], [0, 3, 0], [0, 0, 3]])
    assert all(torch.equal(spread[dst][src], kept[src][dst]) for src in range(3) for dst in range(3))
    assert not torch.equal(kept[0], inputs[0])


SHAPES = [(0, 5), (1, 1), (1, 19), (2, 70), (17, 64)]


def check_broadcast(preset: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for index, (num_tokens, num_features) in enumerate(SHAPES):
        src = index % world_size
        for dtype in (torch.bfloat16, torch.float32):
            x_TE = partials(1, num_tokens, num_features, dtype=dtype, seed=src)[0]
            for codec in codecs_for(preset, world_size, num_features):
                found = narrowcast.broadcast(
                    x_TE if rank == src else None,
                    src=src,
                    codec=codec,
                    num_tokens=num_tokens,
                    num_features=num_features,
                    dtype=dtype,
                )
                assert same_bits(found, simulate.broadcast(x_TE, src=src, world_size=world_size, codec=codec))


@every_world
@pytest.mark.parametrize("preset", ["bf16", "int4-feature"])
def test_broadcast_equals_its_twin(ranks: Pools, world_size: int, preset: str) -> None:
    ranks(world_size).run(check_broadcast, preset)


def check_pipeline(preset: str) -> None:
    """Each rank hands its tokens to the next one: rank 0 sends first, the last one only receives."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for num_tokens, num_features in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = partials(world_size, num_tokens, num_features, dtype=dtype)
            for codec in codecs_for(preset, world_size, num_features):
                if rank > 0:
                    found = narrowcast.recv(num_tokens, num_features, src=rank - 1, codec=codec, dtype=dtype)
                    expected = simulate.send(inputs[rank - 1], src=rank - 1, world_size=world_size, codec=codec)
                    assert same_bits(found, expected)
                if rank < world_size - 1:
                    assert narrowcast.send(inputs[rank], dst=rank + 1, codec=codec) is inputs[rank]


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("preset", ["cast(dtype=fp16)", "int4-feature"])
def test_what_is_received_equals_its_twin(ranks: Pools, world_size: int, preset: str) -> None:
    ranks(world_size).run(check_pipeline, preset)


def recv(num_tokens: int) -> Tensor:
    return narrowcast.recv(num_tokens, 4096, src=1 - dist.get_rank(), codec=FP32, dtype=torch.float32)


def send(x_TE: Tensor) -> Pending:
    return narrowcast.send(x_TE, dst=1 - dist.get_rank(), codec=FP32, async_op=True)


def check_turns() -> None:
    """Megabytes, so that nothing fits into a socket's buffer by luck."""
    rank = dist.get_rank()
    x_TE = torch.full((300, 4096), float(rank))
    # One sends and then receives, the other the other way round.
    if rank == 0:
        send(x_TE).wait()
        assert recv(300)[0, 0] == 1
    else:
        assert recv(300)[0, 0] == 0
        send(x_TE).wait()
    # Both have sends in flight, and wait for them after what they receive.
    sends = [send(torch.full((100 + index, 4096), float(index))) for index in range(3)]
    assert [recv(100 + index)[0, 0].item() for index in range(3)] == [0, 1, 2]
    assert [pending.wait()[0, 0].item() for pending in reversed(sends)] == [2, 1, 0]


def test_sends_and_receives_in_turn_and_in_flight(ranks: Pools) -> None:
    ranks(2).run(check_turns)


def check_among_collectives() -> None:
    """A transfer of two ranks starts, on one of them, before a collective that the other one waits for first."""
    rank = dist.get_rank()
    inputs = partials(3, 12, 70)
    codecs = codecs_for("int4-feature", 3, 70)
    expected = simulate.all_reduce(inputs, codec=codecs, algorithm="two_shot")

    def total() -> Pending:
        return narrowcast.all_reduce(inputs[rank], codec=codecs, algorithm="two_shot", async_op=True)

    for late in (False, True):
        before = total()
        received = None
        if rank == 1:
            received = narrowcast.recv(12, 70, src=0, codec=FP32, dtype=torch.float32, async_op=True)
        if rank == 0 and not late:
            narrowcast.send(inputs[0], dst=1, codec=FP32)
        after = total()
        assert same_bits(after.wait(), expected)  # rank 1 has not waited for what it receives
        if rank == 0 and late:
            narrowcast.send(inputs[0], dst=1, codec=FP32)
        if received is not None:
            assert same_bits(received.wait(), inputs[0])
        assert same_bits(before.wait(), expected)


def test_transfers_do_not_hold_back_collectives(ranks: Pools) -> None:
    ranks(3).run(check_among_collectives)


def check_unfinished_collective() -> None:
    """Who waits for a transfer goes on with the collectives before it, which the other end may be waiting for."""
    rank = dist.get_rank()
    inputs = partials(2, 12, 70)
    pending = narrowcast.all_reduce(inputs[rank], codec=FP32, algorithm="two_shot", async_op=True)
    if rank == 0:
        found = narrowcast.recv(12, 70, src=1, codec=FP32, dtype=torch.float32)
        assert same_bits(found, inputs[1])
        pending.wait()
    else:
        pending.wait()
        narrowcast.send(inputs[1], dst=0, codec=FP32)


def test_a_transfer_is_no_wait_for_what_nobody_goes_on_with(ranks: Pools) -> None:
    ranks(2).run(check_unfinished_collective)


def tags_of(pair: tuple[int, int] | None, count: int) -> list[int]:
    """The tags of `count` transfers of three exchanges (one between two ranks), on a transport that only notes them."""
    tags: list[int] = []

    class Notes(TorchDistributedTransport):
        def exchange(self, sends: object, recvs: object, *, tag: int) -> "Notes":  # type: ignore[override]
            tags.append(tag)
            return self

        def wait(self) -> None: ...

    def steps() -> Steps:
        for _ in range(3 if pair is None else 1):
            yield Exchange([None], [None], 0)
        return torch.empty(0)

    transport = Notes()
    for _ in range(count):
        Pending(steps(), transport, pair=pair).wait()
    return tags


def check_tags() -> None:
    collectives, transfers = tags_of(None, 5), tags_of((0, 1), 5)
    assert len({*collectives, *transfers}) == 5 * 3 + 5
    assert not {tag % 2 for tag in collectives} & {tag % 2 for tag in transfers}  # for ever


def test_tags_of_transfers_and_collectives_never_meet(ranks: Pools) -> None:
    ranks(1).run(check_tags)


def check_refusals() -> None:
    rank, x_TE = dist.get_rank(), torch.ones(3, 70)
    other = {"codec": FP32, "dtype": torch.float32}

    def to_all(x_TE: Tensor, sends: list[int], recvs: list[int], codec: Codec = FP32) -> None:
        narrowcast.all_to_all(x_TE, codec=codec, send_counts=sends, recv_counts=recvs)

    mine, theirs = ([1, 2], [1, 5]) if rank == 0 else ([2, 1], [5, 1])
    with pytest.raises(InvalidInputError, match=r"send_counts: expected one count for each of 2 ranks, found \[3\]"):
        to_all(x_TE, [3], theirs)
    with pytest.raises(InvalidInputError, match=r"recv_counts: expected one count for each of 2 ranks"):
        to_all(x_TE, mine, [-1, 4])
    with pytest.raises(InvalidInputError, match=r"counts of 3 tokens in all, found \[2, 2\], 4 in all"):
        to_all(x_TE, [2, 2], theirs)
    with pytest.raises(InvalidInputError, match=rf"recv_counts\[{rank}\]: expected 1, as rank {rank} keeps for itself"):
        to_all(x_TE, mine, [3, 3])
    with pytest.raises(InvalidInputError, match=r"\[tokens, features\], found \[1, 3, 70\]"):
        to_all(x_TE[None], mine, theirs)
    with pytest.raises(InvalidInputError, match="calibrated for 2 ranks, or for the sum, found 3 sources"):
        to_all(x_TE, mine, theirs, codecs_for("int4-feature", 3, 70)[0])
    for peer in (rank, 2, -1):
        with pytest.raises(InvalidInputError, match=rf"dst: expected a rank from 0 to 1, other than {rank}"):
            narrowcast.send(x_TE, dst=peer, codec=FP32)
        with pytest.raises(InvalidInputError, match=rf"src: expected a rank from 0 to 1, other than {rank}"):
            narrowcast.recv(3, 70, src=peer, **other)
    with pytest.raises(InvalidInputError, match="src: expected a rank from 0 to 1, found 2"):
        narrowcast.broadcast(x_TE, src=2, num_tokens=3, num_features=70, **other)
    for wrong, found in ((None, "none"), (x_TE[:2], r"\[2, 70\]")):
        with pytest.raises(InvalidInputError, match=rf"a tensor \[3, 70\] at rank {rank}, found {found}"):
            narrowcast.broadcast(wrong, src=rank, num_tokens=3, num_features=70, **other)
    with pytest.raises(InvalidInputError, match=r"values \[tokens, features\] in bf16, fp16 or fp32"):
        narrowcast.send(x_TE.double(), dst=1 - rank, codec=FP32)
    # Nothing that was refused counts: the ranks are still in step, even though one of them was refused more.
    if rank == 0:
        narrowcast.send(x_TE, dst=1, codec=FP32)
        with pytest.raises(InvalidInputError):
            narrowcast.all_reduce(x_TE.double(), codec=FP32)
    else:
        assert same_bits(narrowcast.recv(3, 70, src=0, **other), x_TE)
    assert narrowcast.all_reduce(x_TE, codec=FP32)[0, 0] == 2


def test_what_does_not_fit_is_refused(ranks: Pools) -> None:
    ranks(2).run(check_refusals)


def test_the_twin_refuses_contradicting_counts() -> None:
    with pytest.raises(InvalidInputError, match="counts of 2 tokens in all"):
        simulate.all_to_all(partials(2, 2, 5), codec=FP32, send_counts=[[1, 1], [1, 2]])
