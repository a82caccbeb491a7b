"""Collectives on real ranks, over gloo and the TCP mesh: bit for bit their twins, and alike on all ranks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import narrowcast
from formats import FORMATS
from models import calibrated
from narrowcast.codecs import PRESETS, CastCodec, Codec, recipe
from narrowcast.collectives import ALGORITHMS, Hops, Pending, choose, simulate
from narrowcast.collectives.base import Sent
from narrowcast.collectives.two_shot import shares
from narrowcast.errors import InvalidInputError
from ranks import Ranks
from transports import GLOO, TCP, Kind, needs_mesh, over_both

Pools = Callable[[int], Ranks]
few_worlds = pytest.mark.parametrize("world_size", [2, 3, 5])
every_world = pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 8])

# Fewer tokens than ranks cut features into blocks; fewer features than ranks leave one_shot alone.
SHAPES = [(0, 5), (1, 1), (1, 19), (2, 70), (3, 7), (5, 200), (17, 64), (9, 1)]


def partials(world_size: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(world_size)]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


CASES = [(dtype, way) for dtype in (torch.bfloat16, torch.float16, torch.float32) for way in ("auto", *ALGORITHMS)]


def summands(world_size: int, shape: tuple[int, int], preset: str) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """What all ranks put in, and the options of the sum, for each of `CASES`."""
    codecs = calibrated(preset, torch.stack(partials(world_size, 30, shape[1], seed=1)))
    for dtype, algorithm in CASES:
        yield partials(world_size, *shape, dtype=dtype), {"codec": codecs, "algorithm": algorithm}


def sums_on_rank(shapes: Sequence[tuple[int, int]], preset: str, kind: Kind) -> list[Tensor]:
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), kind()
    return [
        narrowcast.all_reduce(inputs[rank], group=group, **options)
        for shape in shapes
        for inputs, options in summands(world_size, shape, preset)
    ]


def check_all_reduce(pool: Ranks, shapes: Sequence[tuple[int, int]], preset: str, kind: Kind = GLOO) -> None:
    found = zip(*pool.run(sums_on_rank, shapes, preset, kind), strict=True)
    for shape in shapes:
        for (inputs, options), of_ranks in zip(summands(pool.world_size, shape, preset), found, strict=False):
            expected = simulate.all_reduce(inputs, **options)
            assert all(same_bits(each, expected) for each in of_ranks), (shape, inputs[0].dtype, options["algorithm"])
    assert not list(found)


@every_world
@pytest.mark.parametrize(
    ("preset", "kind"), [("bf16", GLOO), ("int4-feature", GLOO), pytest.param("int4-feature", TCP, marks=needs_mesh)]
)
def test_all_reduce_equals_its_twin(ranks: Pools, world_size: int, preset: str, kind: Kind) -> None:
    check_all_reduce(ranks(world_size), SHAPES, preset, kind)


@few_worlds
@pytest.mark.parametrize("preset", ["cast(dtype=fp32)", "feature(bits=3)", "int4"])
def test_other_widths_equal_their_twins(ranks: Pools, world_size: int, preset: str) -> None:
    check_all_reduce(ranks(world_size), SHAPES, preset)


# Blocks of whole groups for each rank, the last one short; too few groups; a scale for the whole token.
GROUPED = [
    "int4-group128",
    "group(bits=3, size=32, symmetric=true)",
    "int2-group32-spike",
    "mxfp4",
    "minifloat(element=e4m3, scale=e8m0, size=32)",
    "nvfp4",
    "fp8",
]
GROUPED_SHAPES = [(1, 5), (1, 165), (2, 290), (3, 64), (4, 650), (7, 129)]


@few_worlds
@pytest.mark.parametrize("preset", GROUPED)
def test_codecs_with_groups_equal_their_twins(ranks: Pools, world_size: int, preset: str) -> None:
    check_all_reduce(ranks(world_size), GROUPED_SHAPES, preset)


def check_mixed_stages() -> None:
    """Groups of 32 and of 128, and calibrated features: cut where all of them may be cut."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    fine, coarse = recipe("group(bits=4, size=32)"), recipe("int8-group128")
    _, feature = calibrated("int6-feature", torch.stack(partials(world_size, 30, 700, seed=1)))
    inputs = partials(world_size, 1, 700)
    for codecs in ((fine, coarse), (coarse, fine), (fine, feature), (coarse, feature), (recipe("bf16"), fine)):
        found = narrowcast.all_reduce(inputs[rank], codec=codecs, algorithm="two_shot")
        assert same_bits(found, simulate.all_reduce(inputs, codec=codecs, algorithm="two_shot"))


@few_worlds
def test_stages_of_different_granularity(ranks: Pools, world_size: int) -> None:
    ranks(world_size).run(check_mixed_stages)


@settings(max_examples=100, deadline=None)
@given(
    num_tokens=st.integers(0, 8),
    num_features=st.integers(1, 2000),
    world_size=st.integers(1, 8),
    presets=st.tuples(*[st.sampled_from(["bf16", "group(bits=4, size=32)", "int4-group128", "nvfp4"])] * 2),
)
def test_shares_are_whole_groups_and_cover_all(
    num_tokens: int, num_features: int, world_size: int, presets: tuple[str, str]
) -> None:
    hops = Hops(tuple(recipe(preset) for preset in presets))
    owners = shares(hops, num_tokens, num_features, world_size)
    grains = [codec.granularity for codec in hops.codecs]
    if owners is None:
        assert num_tokens < world_size
        assert None in grains or -(-num_features // math.lcm(*grains)) < world_size
        return
    seen = torch.zeros(num_tokens, num_features, dtype=torch.int64)
    for owner in owners:
        seen[owner.tokens, owner.features] += 1
        assert owner.features.start < owner.features.stop
        assert num_tokens >= world_size or all(owner.features.start % grain == 0 for grain in grains)
    assert (seen == 1).all()


def test_with_fewer_groups_than_ranks_one_shot_runs() -> None:
    codec = recipe("int4-group128")
    hops = Hops((codec, codec))
    assert choose("two_shot", hops, 1, 4096, 8) == "two_shot"
    assert choose("two_shot", hops, 1, 7 * 128, 8) == "one_shot"
    assert choose("two_shot", hops, 1, 7 * 128 + 1, 8) == "two_shot"
    assert choose("auto", Hops((recipe("nvfp4"),) * 2), 7, 4096, 8) == "one_shot"
    assert choose("auto", Hops((recipe("nvfp4"),) * 2), 8, 4096, 8) == "two_shot"


def check_scatter_and_gather(preset: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partial, reduced = calibrated(preset, torch.stack(partials(world_size, 30, 70, seed=1)))
    inputs = partials(world_size, 11, 70)
    found = narrowcast.reduce_scatter(inputs[rank], codec=partial)
    assert same_bits(found, simulate.reduce_scatter(inputs, codec=partial)[rank])
    for codec in (partial, reduced):
        assert same_bits(narrowcast.all_gather(inputs[rank], codec=codec), simulate.all_gather(inputs, codec=codec))
    ragged = [x[: 3 * other] for other, x in enumerate(inputs)]
    counts = [len(x) for x in ragged]
    found = narrowcast.all_gather(ragged[rank], codec=partial, num_tokens=counts)
    assert same_bits(found, simulate.all_gather(ragged, codec=partial))


@every_world
@pytest.mark.parametrize("preset", ["cast(dtype=fp16)", "int4-feature", "group(bits=4, size=32)", "nvfp4"])
def test_reduce_scatter_and_all_gather_equal_their_twins(ranks: Pools, world_size: int, preset: str) -> None:
    ranks(world_size).run(check_scatter_and_gather, preset)


def check_against_gloo() -> None:
    """fp32 casts lose nothing: what is left is the order of the sum."""
    inputs = partials(dist.get_world_size(), 2, 5, 33)
    native = inputs[dist.get_rank()].clone()
    dist.all_reduce(native)
    for algorithm in ALGORITHMS:
        found = narrowcast.all_reduce(
            inputs[dist.get_rank()], codec=CastCodec(dtype=torch.float32), algorithm=algorithm
        )
        assert found.shape == (2, 5, 33)
        # Each of R - 1 additions rounds by half a unit of a sum of at most R * max |x|.
        bound = len(inputs) ** 2 * max(x.abs().max() for x in inputs) * 2**-24
        assert (found - native).abs().max() <= bound


@every_world
def test_uncompressed_sums_agree_with_gloos_own(ranks: Pools, world_size: int) -> None:
    ranks(world_size).run(check_against_gloo)


def check_async(kind: Kind) -> None:
    """Several at once, waited for in another order on every rank."""
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), kind()
    codecs = calibrated("int4-feature", torch.stack(partials(world_size, 30, 70, seed=1)))
    inputs = [partials(world_size, 6, 70, seed=seed) for seed in range(5)]

    def start(x: Tensor) -> Pending:
        return narrowcast.all_reduce(x, codec=codecs, group=group, algorithm="two_shot", async_op=True)

    pending = [start(each[rank]) for each in inputs]
    for index in torch.randperm(5, generator=torch.Generator().manual_seed(rank)).tolist():
        expected = simulate.all_reduce(inputs[index], codec=codecs, algorithm="two_shot")
        assert same_bits(pending[index].wait(), expected)
        assert pending[index].wait() is pending[index].wait()


@over_both
@pytest.mark.parametrize("world_size", [1, 3])
def test_several_collectives_under_way_at_once(ranks: Pools, world_size: int, kind: Kind) -> None:
    ranks(world_size).run(check_async, kind)


def check_interleaved(kind: Kind) -> None:
    """A third collective starts before one rank has waited for the second, and after the other one has."""
    rank, group = dist.get_rank(), kind()
    codecs = calibrated("int4-feature", torch.stack(partials(2, 30, 70, seed=1)))
    inputs = [partials(2, 6, 70, seed=seed) for seed in range(3)]
    expected = [simulate.all_reduce(each, codec=codecs, algorithm="two_shot") for each in inputs]

    def start(index: int) -> Pending:
        x = inputs[index][rank]
        return narrowcast.all_reduce(x, codec=codecs, group=group, algorithm="two_shot", async_op=True)

    pending = [start(0), start(1)]
    found = {rank: pending[1 - rank].wait()}
    pending.append(start(2))
    assert same_bits(found[rank], expected[1 - rank])
    for index in (2, 1, 0):
        assert same_bits(pending[index].wait(), expected[index])


@over_both
def test_collectives_started_and_awaited_in_turn(ranks: Pools, kind: Kind) -> None:
    ranks(2).run(check_interleaved, kind)


def check_nan() -> list[bool]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    codecs = calibrated("int4-feature", torch.stack(partials(world_size, 30, 70, seed=1)))
    inputs = partials(world_size, 4, 70)
    inputs[1][2, 33] = torch.nan
    inputs[1][0, 7] = torch.inf
    found = [narrowcast.all_reduce(inputs[rank], codec=codecs, algorithm=algorithm) for algorithm in ALGORITHMS]
    assert all(same_bits(each.isnan(), found[0].isnan()) for each in found)
    return found[0].isnan().nonzero().tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_nan_in_one_ranks_partial_is_nan_on_all(ranks: Pools, world_size: int) -> None:
    assert ranks(world_size).run(check_nan) == [[[0, 7], [2, 33]]] * world_size


def check_subgroup() -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return
    inputs = partials(2, 5, 70)
    codecs = calibrated("int4-feature", torch.stack(partials(2, 30, 70, seed=1)))
    found = narrowcast.all_reduce(inputs[dist.get_rank(group)], codec=codecs, group=group)
    assert same_bits(found, simulate.all_reduce(inputs, codec=codecs))


def test_a_group_of_some_ranks(ranks: Pools) -> None:
    ranks(3).run(check_subgroup)


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 16),
    num_tokens=st.integers(0, 40),
    num_features=st.integers(1, 300),
    preset=st.sampled_from(["bf16", "int4-feature", "feature(bits=3)"]),
)
def test_auto_sends_the_fewest_bytes(world_size: int, num_tokens: int, num_features: int, preset: str) -> None:
    codecs = Hops(calibrated(preset, torch.ones(world_size, 1, num_features)))

    def total(name: str) -> int | None:
        sent: Sequence[Sent | None] = [
            ALGORITHMS[name].sent(codecs, num_tokens, num_features, rank, world_size) for rank in range(world_size)
        ]
        return None if None in sent else sum(each.nbytes for each in sent if each is not None)

    totals = {name: count for name in ALGORITHMS if (count := total(name)) is not None}
    chosen = choose("auto", codecs, num_tokens, num_features, world_size)
    assert totals[chosen] == min(totals.values())
    if world_size <= 2:
        assert chosen == "one_shot"


def test_the_choice_depends_on_nothing_that_was_chosen_before() -> None:
    """Codecs of other widths must not pass for each other: ranks that disagree would exchange garbage."""
    x_RTE = torch.ones(3, 1, 128)
    fine, coarse = calibrated("int8-feature", x_RTE), calibrated("feature(bits=2)", x_RTE)
    fine_first, coarse_first = Hops((fine[0], coarse[1])), Hops((coarse[0], fine[1]))
    assert fine[0] != coarse[0]
    for _ in range(2):
        assert choose("auto", fine_first, 9, 128, 3) == "two_shot"
        assert choose("auto", coarse_first, 9, 128, 3) == "one_shot"


def test_between_two_ranks_auto_takes_one_latency() -> None:
    fine, coarse = (calibrated(codec, torch.ones(2, 1, 128)) for codec in ("int8-feature", "feature(bits=2)"))
    assert choose("auto", Hops((fine[0], coarse[1])), 8, 128, 2) == "one_shot"


def test_one_shot_at_the_papers_bits_moves_more_than_a_bf16_ring_from_eight_ranks_on() -> None:
    """Why auto counts: 7 payloads of 4.19 bits against 2 * 7 / 8 of 16."""
    codecs = Hops(calibrated("int4-feature", torch.ones(8, 1, 4096)))
    one, two = (ALGORITHMS[name].sent(codecs, 512, 4096, 0, 8) for name in ("one_shot", "two_shot"))
    assert one is not None and two is not None
    ring = 2 * 7 * 512 * 4096 * 2 // 8
    assert one.nbytes > ring
    assert two.nbytes < ring / 3.8


def test_what_does_not_fit_is_refused() -> None:
    partial, reduced = calibrated("int4-feature", torch.ones(2, 1, 70))
    inputs = partials(3, 4, 70)
    with pytest.raises(InvalidInputError, match="calibrated for 3 ranks, found 2"):
        simulate.all_reduce(inputs, codec=(partial, reduced))
    with pytest.raises(InvalidInputError, match="for the reduced sum, which travels again, found 1"):
        simulate.all_reduce(inputs[:2], codec=partial, algorithm="two_shot")
    with pytest.raises(InvalidInputError, match="single source, found 2"):
        simulate.all_reduce(inputs[:2], codec=(partial, partial))
    with pytest.raises(InvalidInputError, match="auto, one_shot, two_shot, hierarchical, found 'ring'"):
        simulate.all_reduce(inputs[:2], codec=(partial, reduced), algorithm="ring")
    with pytest.raises(InvalidInputError, match="calibrated for 3 ranks, or for the sum"):
        simulate.all_gather(inputs, codec=partial)
    for wrong in ("int4-feature", recipe("int4-feature")):
        with pytest.raises(InvalidInputError, match=r"a codec, or several by hop"):
            simulate.all_reduce(inputs, codec=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"torch.distributed to be initialised"):
        narrowcast.all_reduce(inputs[0], codec=reduced)


def check_ragged_refused() -> str:
    codec = CastCodec(dtype=torch.float32)
    for collective in (narrowcast.reduce_scatter, narrowcast.all_gather):
        with pytest.raises(InvalidInputError, match=r"\[tokens, features\], found \[2, 3, 4\]"):
            collective(torch.ones(2, 3, 4), codec=codec)
    with pytest.raises(InvalidInputError, match="found a scalar"):
        narrowcast.all_reduce(torch.tensor(1.0), codec=codec)
    with pytest.raises(InvalidInputError) as error:
        narrowcast.all_gather(torch.ones(3, 4), codec=CastCodec(dtype=torch.float32), num_tokens=[3])
    return str(error.value)


def test_counts_that_do_not_fit_are_refused(ranks: Pools) -> None:
    assert "one count for each of 2 ranks" in ranks(2).run(check_ragged_refused)[0]


def test_every_preset_has_a_recipe_that_serves_both_stages() -> None:
    for preset in FORMATS:
        partial, reduced = calibrated(preset, torch.ones(2, 1, 70))
        assert reduced.num_sources in (None, 1)
        assert partial.num_sources in (None, 2)


def with_other_codecs(how: str, kind: Kind) -> str:
    """What a rank is told that codes with other scales than the rest, of as many bytes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = kind(dist.new_group())  # type: ignore[call-arg]
    x_RTE = torch.stack(partials(world_size, 6, 64))
    codecs = calibrated("int4-feature", x_RTE * (1 + rank // (world_size - 1)))
    x_TE, options = x_RTE[rank], {"codec": codecs[1], "group": group}
    counts = {"send_counts": [2, 2, 2], "recv_counts": [2, 2, 2]}
    sizes = {"num_tokens": 6, "num_features": 64, "dtype": torch.float32}
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: narrowcast.all_reduce(x_TE, codec=codecs, group=group),
        "reduce_scatter": lambda: narrowcast.reduce_scatter(x_TE, codec=codecs, group=group),
        "all_gather": lambda: narrowcast.all_gather(x_TE, **options),
        "all_to_all": lambda: narrowcast.all_to_all(x_TE, **counts, **options),
        "broadcast": lambda: narrowcast.broadcast(x_TE, src=0, **sizes, **options),
        "send": lambda: narrowcast.recv(6, 64, src=0, dtype=x_TE.dtype, **options) if rank else send_to_all(),
    }

    def send_to_all() -> None:
        for dst in range(1, world_size):
            narrowcast.send(x_TE, dst=dst, **options)

    try:
        calls[how]()
    except InvalidInputError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"])
@over_both
def test_ranks_with_other_codecs_of_the_same_size_are_refused(ranks: Pools, how: str, kind: Kind) -> None:
    told = ranks(3).run(with_other_codecs, how, kind)
    assert [each.partition(":")[0] for each in told] == ["codec of rank 2", "codec of rank 2", "codec of rank 0"]
    assert all("Pass the same codecs on every rank" in each for each in told)


@over_both
def test_who_receives_compares_codecs_with_who_sends(ranks: Pools, kind: Kind) -> None:
    *good, told = ranks(3).run(with_other_codecs, "send", kind)
    assert good == ["nothing", "nothing"]
    assert "codec of rank 0: expected that of rank 2, feature(num_bits=4), with the same tensors, found other" in told


def sent_under(last: list[Codec]) -> list[str]:
    """What each of two ranks is told of three transfers from rank 0, in the last of which their codecs differ."""
    group, x_TE = GLOO(dist.new_group()), torch.ones(3, 64)  # type: ignore[call-arg]
    rank, found = group.rank, []
    for codec in (PRESETS["int4-group128"], PRESETS["mxfp4"], last[rank]):
        try:
            if rank == 0:
                narrowcast.send(x_TE, dst=1, codec=codec, group=group)
            else:
                narrowcast.recv(3, 64, src=0, codec=codec, dtype=x_TE.dtype, group=group)
            found.append("")
        except InvalidInputError as error:
            found.append(str(error))
    return found


def test_the_sentence_names_both_codecs(ranks: Pools) -> None:
    """Of as many bytes, and after others on which both agreed."""
    last = [CastCodec(dtype=torch.bfloat16), CastCodec(dtype=torch.float16)]
    nothing, (first, second, told) = ranks(2).run(sent_under, last)
    assert (nothing, first, second) == ([""] * 3, "", "")
    assert "codec of rank 0: expected that of rank 1, cast(dtype=float16), with the same tensors" in told
    assert "found cast(dtype=bfloat16)" in told


def with_one_new_codec() -> str:
    """Rank 1 takes another codec than the one that all have used before."""
    group, x_TE = TCP(dist.new_group()), torch.ones(3, 64)  # type: ignore[call-arg]
    codecs = [PRESETS["int4-group128"], PRESETS["int4-group32-sym" if group.rank == 1 else "int4-group128"]]
    try:
        for codec in codecs:
            narrowcast.all_gather(x_TE, codec=codec, group=group)
    except InvalidInputError as error:
        return str(error)
    return "nothing"


@needs_mesh
def test_a_codec_that_is_new_to_one_rank_alone_is_named(ranks: Pools) -> None:
    theirs, mine = ranks(2).run(with_one_new_codec)
    assert "256 bytes compare codecs that are new to one" in theirs
    assert "codecs of rank 1, group(num_bits=4, group_size=32" in mine
    assert "found that another one uses those that it used before" in mine
