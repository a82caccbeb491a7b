"""hierarchical on real gloo ranks: nodes of equal and unequal size, with the codecs that their hops need."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import narrowcast
from models import calibrated
from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Hops, Pending, all_reduce_steps, checked_hops, choose, named, simulate
from narrowcast.collectives.base import Traffic
from narrowcast.errors import InvalidInputError
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks
from test_collectives import partials, same_bits

Pools = Callable[[int], Ranks]
Groups = Sequence[Sequence[int]]

# No tokens, one token, fewer tokens than owners, odd widths; too few features to share; more tokens than ranks.
SHAPES = [(0, 5), (1, 1), (1, 19), (2, 70), (3, 7), (5, 33), (11, 64)]

NODES = [
    [[0]],
    [[0], [1]],
    [[1, 0]],
    [[0, 1], [2]],
    [[0, 1], [2, 3]],
    [[0, 2], [1, 3]],
    [[3], [0, 1, 2]],
    [[0, 1, 2, 3]],
    [[4, 1], [0, 2, 3]],
    [[0, 1, 2], [3, 4, 5]],
    [[0, 5], [1, 4], [2, 3]],
    [[0, 1, 2, 3], [4, 5, 6, 7]],
    [[0, 1], [2, 3], [4, 5], [6, 7]],
    [[7, 0, 3], [1, 2, 4, 5, 6]],
]


def codecs_for(kind: str, groups: Groups, num_features: int) -> list[Codec]:
    """Within a node bf16 or 8 bits, between nodes 4: each calibrated on what it will carry."""
    world_size = sum(len(group) for group in groups)
    x_RTE = torch.stack(partials(world_size, 30, num_features, seed=1))
    # Sources of very different size show whose scales were taken.
    x_RTE *= 2.0 ** torch.arange(world_size)[:, None, None]
    if kind == "fp32":
        return [CastCodec(dtype=torch.float32)]
    nodes_NTE = torch.stack([x_RTE[list(group)].sum(dim=0) for group in groups])
    within = calibrated("int8-feature" if kind == "int8" else "bf16", x_RTE)
    return [*within, calibrated("int4-feature", nodes_NTE)[0]]


def check_nodes(groups: Groups, kind: str) -> None:
    transport = TorchDistributedTransport()
    for num_tokens, num_features in SHAPES:
        codecs = codecs_for(kind, groups, num_features)
        hops = checked_hops(codecs, transport.world_size, groups)
        for dtype in (torch.bfloat16, torch.float32):
            inputs = partials(transport.world_size, num_tokens, num_features, dtype=dtype)
            x_TE = inputs[transport.rank]
            expected = simulate.all_reduce(inputs, codec=codecs, groups=groups, algorithm="hierarchical")
            for algorithm in ("auto", "hierarchical"):
                found = narrowcast.all_reduce(x_TE, codec=codecs, groups=groups, algorithm=algorithm)
                assert same_bits(found, expected), (groups, num_tokens, num_features, dtype)
            check_counts(x_TE, hops, transport)


def check_counts(x_TE: Tensor, hops: Hops, transport: TorchDistributedTransport) -> None:
    """What `sent` promises is what travels, and what a rank clips is counted once."""
    name = choose("hierarchical", hops, *x_TE.shape, transport.world_size)
    promised = named(name).sent(hops, *x_TE.shape, transport.rank, transport.world_size)
    counted: list[Traffic] = []
    Pending(all_reduce_steps(x_TE, hops, transport, name), transport, counted.append).wait()
    assert promised is not None and promised.total == tuple(map(sum, zip(*counted, strict=True)))


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp32"])
@pytest.mark.parametrize("groups", NODES, ids=str)
def test_hierarchical_equals_its_twin(ranks: Pools, groups: Groups, kind: str) -> None:
    ranks(sum(map(len, groups))).run(check_nodes, groups, kind)


def check_clipping(groups: Groups) -> tuple[int, int]:
    transport = TorchDistributedTransport()
    hops = checked_hops(codecs_for("int8", groups, 70), transport.world_size, groups)
    inputs = [x * 40 for x in partials(transport.world_size, 11, 70)]
    inputs[1][3, 5] = torch.nan
    stats = torch.zeros(3, dtype=torch.int64)
    steps = all_reduce_steps(inputs[transport.rank], hops, transport, "hierarchical", stats)
    y_TE = Pending(steps, transport).wait()
    assert y_TE.isnan().nonzero().tolist() == [[3, 5]]
    dist.all_reduce(stats)
    counted = torch.zeros(3, dtype=torch.int64)
    simulate.all_reduce(inputs, codec=hops.codecs, groups=groups, algorithm="hierarchical", stats=counted)
    assert stats.tolist() == counted.tolist()
    return counted[0].item(), counted[1].item()


def test_nan_and_clipping_are_seen_on_the_way(ranks: Pools) -> None:
    for groups in ([[0, 2], [1, 3]], [[3], [0, 1, 2]]):
        ((clipped, not_finite),) = set(ranks(4).run(check_clipping, groups))
        assert clipped > 0
        assert not_finite == 3  # in the partial sum, in the node's, and in the total


def check_several() -> None:
    """Under way at once with others, waited for in another order on every rank; some own nothing."""
    rank, groups = dist.get_rank(), [[3], [0, 1, 2]]
    codecs = codecs_for("int8", groups, 70)
    inputs = [partials(4, 6, 70, seed=seed) for seed in range(4)]
    pending = [
        narrowcast.all_reduce(each[rank], codec=codecs, groups=groups, algorithm=algorithm, async_op=True)
        for each, algorithm in zip(inputs, ("hierarchical", "two_shot") * 2, strict=True)
    ]
    for index in torch.randperm(4, generator=torch.Generator().manual_seed(rank)).tolist():
        algorithm = ("hierarchical", "two_shot")[index % 2]
        expected = simulate.all_reduce(inputs[index], codec=codecs, groups=groups, algorithm=algorithm)
        assert same_bits(pending[index].wait(), expected)


def test_several_under_way_at_once(ranks: Pools) -> None:
    ranks(4).run(check_several)


@settings(max_examples=80, deadline=None)
@given(
    nodes=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    num_tokens=st.integers(0, 9),
    num_features=st.integers(1, 40),
    data=st.data(),
)
def test_the_twin_is_a_sum_within_the_bounds_of_its_codecs(
    nodes: list[int], num_tokens: int, num_features: int, data: st.DataObject
) -> None:
    """Nodes of any shape: rounding of three hops is all that parts the result from the exact sum."""
    groups = [[rank for rank, node in enumerate(nodes) if node == each] for each in sorted(set(nodes))]
    inputs = partials(len(nodes), num_tokens, num_features, seed=data.draw(st.integers(0, 99)))
    found = simulate.all_reduce(inputs, codec=CastCodec(dtype=torch.bfloat16), groups=groups, algorithm="hierarchical")
    total_TE = torch.stack(inputs).abs().sum(dim=0)
    # Three roundings to bf16 (2**-8 at most, of a magnitude that grew by as much), and fp32 sums far below that.
    assert ((found - torch.stack(inputs).sum(dim=0)).abs() <= total_TE * 3.1 * 2**-8 + 1e-6).all()


def test_ranks_of_a_node_are_added_up_in_rank_order() -> None:
    """However the group lists them: 2**24 + 1 - 2**24 is 0 in fp32, 2**24 - 2**24 + 1 is not."""
    inputs = [torch.full((1, 3), value) for value in (2.0**24, 1.0, -(2.0**24))]
    for group in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        codec = CastCodec(dtype=torch.float32)
        found = simulate.all_reduce(inputs, codec=codec, groups=[group], algorithm="hierarchical")
        assert found.tolist() == [[0, 0, 0]]


def test_between_nodes_travels_less_than_a_flat_sum_sends_there() -> None:
    """Two nodes of four: an owner sends a quarter of one 4-bit payload to the other node."""
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    hops = checked_hops(codecs_for("int8", groups, 256), 8, groups)
    sent = named("hierarchical").sent(hops, 512, 256, 0, 8)
    within, reduced, between = (codec.payload_nbytes(512, 256) for codec in hops.codecs)
    assert sent is not None
    assert sent.nbytes == (3 * within + 3 * reduced + between) // 4
    assert choose("auto", hops, 512, 256, 8) == "hierarchical"


def test_auto_falls_back_where_hierarchical_cannot_run() -> None:
    groups = [[0, 1], [2, 3]]
    codecs = codecs_for("int8", groups, 70)
    assert choose("auto", checked_hops(codecs, 4, groups), 8, 70, 4) == "hierarchical"
    assert choose("auto", checked_hops(codecs, 4), 8, 70, 4) == "two_shot"  # no nodes
    assert choose("auto", checked_hops(codecs[:2], 4, groups), 8, 70, 4) == "two_shot"  # no codec between them
    one_feature = checked_hops(CastCodec(dtype=torch.float32), 4, groups)
    for algorithm in ("auto", "hierarchical"):
        assert choose(algorithm, one_feature, 1, 1, 4) == "one_shot"  # nothing for a second owner


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 4], [3]], [[0, 1, 2, 3], []], [0, 1]])
def test_groups_that_are_no_partition_are_refused(groups: Groups) -> None:
    with pytest.raises(InvalidInputError, match="each rank from 0 to 3 in one group, found") as error:
        simulate.all_reduce(partials(4, 3, 70), codec=CastCodec(dtype=torch.float32), groups=groups)
    assert "groups=[[0, 1], [2, 3]]" in str(error.value)


def test_what_hierarchical_lacks_is_named() -> None:
    inputs, groups = partials(4, 3, 70), [[0, 1], [2, 3]]
    codecs = codecs_for("int8", groups, 70)
    with pytest.raises(InvalidInputError, match="the ranks of each node, found none"):
        simulate.all_reduce(inputs, codec=codecs, algorithm="hierarchical")
    with pytest.raises(InvalidInputError, match="for the sums of nodes, found 2"):
        simulate.all_reduce(inputs, codec=codecs[:2], groups=groups, algorithm="hierarchical")
    with pytest.raises(InvalidInputError, match="2 sources, a node each, found 4"):
        simulate.all_reduce(inputs, codec=[*codecs[:2], codecs[0]], groups=groups)
