"""Tokens far beyond the calibrated ranges: when `feature`'s guard codes them, how, and what that is worth."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from conftest import MODEL
from formats import FORMATS
from models import calibrated
from narrowcast.calibration.text import sequences
from narrowcast.cli.generate import summary
from narrowcast.codecs import (
    Codec,
    FeatureCodec,
    FeatureRecipe,
    GroupCodec,
    arithmetic,
    feature,
    kernels,
    packing,
    recipe,
)
from narrowcast.codecs.base import GUARDED
from narrowcast.collectives import all_reduce_steps, checked_hops, choose, simulate
from narrowcast.collectives.pending import Pending
from narrowcast.engines import load_engine
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.reports import Report, SiteReport
from narrowcast.scores import compare, log_probs
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks
from test_collectives import partials, same_bits

Pools = Callable[[int], Ranks]
with_outliers = pytest.mark.parametrize(
    "preset", [name for name in FORMATS if recipe(name) in [FeatureRecipe(num_bits=bits) for bits in range(2, 9)]]
)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function from whose call on no codec that is made has a guard."""
    return lambda: monkeypatch.setattr(feature, "guard_for", lambda *_: None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_codec(num_features: int, *outliers: int, num_bits: int = 4) -> FeatureCodec:
    """One source, all scales 1."""
    scale = torch.ones(1, num_features, dtype=torch.bfloat16)
    return FeatureCodec(num_bits=num_bits, scale=scale, outliers=torch.tensor(outliers, dtype=torch.int64))


def guarded(codec: Codec, x_TE: Tensor, source: int = 0) -> list[bool]:
    """Whether each token is; the mark and the count must agree."""
    marks, counts = [], []
    for x_E in x_TE:
        stats = torch.zeros(3, dtype=torch.int64)
        row = codec.encode(x_E[None], source=source, stats=stats)[0]
        marks.append(row[:2].tolist() == [0xC1, 0xFF])
        counts.append(bool(stats[GUARDED]))
    assert marks == counts
    return marks


def roundtrip(codec: Codec, x_TE: Tensor, source: int = 0) -> Tensor:
    return codec.decode(codec.encode(x_TE, source=source), source=source)


@pytest.mark.parametrize(
    ("num_features", "num_outliers", "num_bits", "expected"),
    [
        (256, 4, 4, (3, 32)),
        (4096, 64, 8, (7, 32)),
        (4096, 64, 2, (1, 32)),
        (64, 1, 4, (3, 32)),
        (64, 1, 2, (1, 32)),
        (10, 1, 4, (2, 32)),  # three bits would take 9 of 7 bytes
        (4096, 2, 4, (3, 32)),
        (96, 1, 3, (2, 32)),
        (36, 1, 8, (7, 64)),  # 2 + 2 * 2 + 32 bytes in groups of 32 would be one too many
        (3, 1, 4, None),
        (256, 0, 4, None),  # no place for the mark
    ],
)
def test_a_guarded_token_takes_no_more_bytes(
    num_features: int, num_outliers: int, num_bits: int, expected: tuple[int, int] | None
) -> None:
    guard = feature.guard_for(num_features, num_outliers, num_bits)
    assert guard == expected
    if guard is not None:
        row_nbytes = 2 * num_outliers + packing.packed_nbytes(num_features - num_outliers, num_bits)
        assert 2 + guard.nbytes(num_features) <= row_nbytes


def test_layout_of_a_guarded_token() -> None:
    """docs/formats.md, by hand: 16 features, outlier 3; three bits fit, in one group, whose step is 30 / 4."""
    codec = unit_codec(16, 3)
    x_TE = torch.zeros(1, 16)
    x_TE[0, :5] = torch.tensor([20.0, -30.0, 4.0, 9.0, -14.0])
    payload_TB = codec.encode(x_TE, source=0)
    codes = [7, 0, 5, 5, 2, *[4] * 11]
    low = [sum((codes[j + 4 * place] & 3) << 2 * place for place in range(4)) for j in range(4)]
    high = [sum((codes[j + 2 * place] >> 2) << place for place in range(8)) for j in range(2)]
    assert payload_TB.tolist() == [[0xC1, 0xFF, 0xF0, 0x40, *low, *high]]
    assert bytes(payload_TB[0].tolist()).hex(" ") == "c1 ff f0 40 0b 00 01 01 fb fe"
    assert codec.decode(payload_TB, source=0)[0, :6].tolist() == [22.5, -30, 7.5, 7.5, -15, 0]


@with_outliers
@pytest.mark.parametrize("num_features", [64, 70, 256, 1025])
def test_behind_the_mark_stands_what_group_writes(preset: str, num_features: int) -> None:
    """The symmetric codec of one bit less, in groups of 32, and zeros behind it."""
    codec, _ = calibrated(preset, random(1, 20, num_features))
    x_TE = random(4, num_features, seed=1) * 100
    payload_TB = codec.encode(x_TE, source=0)
    if codec.num_bits > 2:  # `group` itself starts at two
        group = GroupCodec(num_bits=codec.num_bits - 1, group_size=32, symmetric=True)
        inside_TB = group.encode(x_TE, source=0)
        end = 2 + inside_TB.shape[1]
        assert torch.equal(payload_TB[:, 2:end], inside_TB)
        assert not payload_TB[:, end:].any()
        expected_TE = group.decode(inside_TB, source=0, num_features=num_features)
        assert torch.equal(codec.decode(payload_TB, source=0), expected_TE)
    assert payload_TB[:, :2].tolist() == [[0xC1, 0xFF]] * 4


def test_with_one_bit_a_value_is_its_groups_farthest_or_zero() -> None:
    codec = unit_codec(64, 0, num_bits=2)
    x_TE = torch.zeros(1, 64)
    x_TE[0, :4], x_TE[0, 32:36] = torch.tensor([8.0, 5.0, 3.0, -7.0]), torch.tensor([-6.0, -2.0, -3.5, 5.0])
    decoded_TE = roundtrip(codec, x_TE)
    assert guarded(codec, x_TE) == [True]
    assert decoded_TE[0, :4].tolist() == [8, 8, 0, 0]  # where 8 is the farthest, no code is negative
    assert decoded_TE[0, 32:36].tolist() == [-6, 0, -6, 0]


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_what_is_far_out(num_bits: int) -> None:
    """A value beyond 4 times what the largest code reaches, or more than 1/16 of the features beyond 3/2."""
    codec, largest = unit_codec(129, 0, num_bits=num_bits), float(2 ** (num_bits - 1) - 1)
    x_TE = torch.zeros(6, 129)
    x_TE[:, 0] = 1e6  # the outlier: may be as large as it likes
    x_TE[0, 5] = 4 * largest
    x_TE[1, 5] = -4 * largest * (1 + 2**-20)
    x_TE[2, 1:9] = 1.6 * largest  # 8 of 128
    x_TE[3, 1:10] = -1.6 * largest
    x_TE[4, 1:] = 1.5 * largest
    assert guarded(codec, x_TE) == [False, True, False, True, False, False]


@with_outliers
def test_a_token_that_is_not_finite_is_left_alone(preset: str) -> None:
    """So that what is not finite is NaN at its own place, and the rest numbers."""
    codec, _ = calibrated(preset, random(1, 20, 130))
    x_TE = random(3, 130, seed=1) * 100
    x_TE[0, 7], x_TE[1, int(codec.outliers[0])] = torch.nan, torch.inf
    assert guarded(codec, x_TE) == [False, False, True]
    assert roundtrip(codec, x_TE).isnan().sum(dim=1).tolist() == [1, 1, 0]


@with_outliers
def test_what_the_guard_leaves_alone_has_the_bytes_it_had(preset: str, unguarded: Callable[[], None]) -> None:
    x_TE = random(60, 200, seed=1)
    x_TE[::3] *= 20
    codec, _ = calibrated(preset, random(1, 20, 200))
    payload_TB, marks_T = codec.encode(x_TE, source=0), torch.tensor(guarded(codec, x_TE))
    unguarded()
    codec, _ = calibrated(preset, random(1, 20, 200))
    clipping_TB = codec.encode(x_TE, source=0)
    assert 20 <= marks_T.sum() < 30
    assert torch.equal(payload_TB[~marks_T], clipping_TB[~marks_T])
    assert (payload_TB[marks_T] != clipping_TB[marks_T]).any(dim=1).all()


def test_without_outliers_or_room_values_clip_as_before() -> None:
    for codec in (unit_codec(64), unit_codec(3, 1)):
        x_TE, stats = torch.full((2, codec.scale.shape[1]), 1e3), torch.zeros(3, dtype=torch.int64)
        decoded_TE = codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0)
        coded = [each for each in range(x_TE.shape[1]) if each not in codec.outliers.tolist()]
        assert (decoded_TE[:, coded] == 7).all()
        assert stats.tolist() == [2 * len(coded), 0, 0]


def test_a_guarded_tokens_values_do_not_count_as_clipped() -> None:
    codec, x_TE, stats = unit_codec(128, 0, 1), torch.zeros(3, 128), torch.zeros(3, dtype=torch.int64)
    x_TE[0], x_TE[1, 9], x_TE[2, 9] = 1e3, 8.0, torch.nan
    codec.encode(x_TE, source=0, stats=stats)
    assert stats.tolist() == [1, 1, 1]


def test_devices_that_would_have_to_be_asked_get_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on the CPU all tokens are coded both ways, and one way is picked."""
    x_RTE = random(2, 20, 130)
    x_RTE[0, ::2] *= 30
    found = []
    for _ in range(2):
        codec, _ = calibrated("int4-feature", random(2, 20, 130, seed=1))
        with kernels.forced("reference"):
            payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
            found.append((payloads_RTB, codec.decode_sum(payloads_RTB)))
        monkeypatch.setattr(arithmetic, "perhaps_any", lambda _: True)
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


@with_outliers
def test_guarded_and_other_ranks_add_up_in_rank_order(preset: str) -> None:
    codec, _ = calibrated(preset, random(4, 20, 130))
    x_RTE = random(4, 8, 130, seed=1) * torch.tensor([1.0, 50.0, 1.0, 50.0])[:, None, None]
    x_RTE[1, :4] /= 50
    payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
    assert ((payloads_RTB[..., 0] == 0xC1) & (payloads_RTB[..., 1] == 0xFF)).sum(dim=1).tolist() == [0, 4, 0, 8]
    total_TE = codec.decode(payloads_RTB[0], source=0)
    for rank in range(1, 4):
        total_TE = total_TE + codec.decode(payloads_RTB[rank], source=rank)
    assert torch.equal(codec.decode_sum(payloads_RTB), total_TE)
    assert torch.equal(codec.decode_sum(payloads_RTB, dtype=torch.bfloat16), total_TE.bfloat16())


# --- What it is worth ------------------------------------------------------------------------------------------------

FAR = {"one feature": 1, "10 % of features": 51, "all features": 512}


def drifting(codec: FeatureCodec, num_far: int, times: float) -> Tensor:
    """Ordinary tokens [50, 512], of whose features `num_far` are up to `times` as large as calibration saw them."""
    generator = torch.Generator().manual_seed(2)
    x_TE = torch.randn(50, 512, generator=generator)
    reach_E = codec.scale[0].float() * (2 ** (codec.num_bits - 1) - 1)
    for x_E in x_TE:
        far = torch.randperm(512, generator=generator)[:num_far]
        x_E[far] = x_E[far].sign() * reach_E[far] * times * (1 + torch.rand(num_far, generator=generator)) / 2
    return x_TE


def relative_error(codec: Codec, x_TE: Tensor) -> float:
    return ((roundtrip(codec, x_TE) - x_TE).square().mean() / x_TE.square().mean()).sqrt().item()


@pytest.mark.parametrize("what", FAR)
@pytest.mark.parametrize(("preset", "most"), [("feature(bits=3)", 0.3), ("int4-feature", 0.15), ("int8-feature", 0.03)])
def test_drift_of_two_decades_stays_readable(
    preset: str, most: float, what: str, unguarded: Callable[[], None]
) -> None:
    """Clipped, 98 % of such tokens would be lost."""
    codec, _ = calibrated(preset, random(1, 400, 512))
    x_TE = drifting(codec, FAR[what], 100)
    assert relative_error(codec, x_TE) < most
    unguarded()
    codec, _ = calibrated(preset, random(1, 400, 512))
    assert relative_error(codec, x_TE) > 0.9


@pytest.mark.parametrize("preset", ["int4-feature", "int8-feature"])
def test_ordinary_text_is_no_worse_for_it(preset: str, unguarded: Callable[[], None]) -> None:
    """The bundled model: without a guard, KL is several times as large at 8 bits."""
    engine = load_engine()
    model, tokenizer = engine.load(MODEL, dtype="float32"), engine.load_tokenizer(MODEL)
    plan = narrowcast.calibrate(
        model, sequences(tokenizer, MODEL / "calibration.txt", length=128, limit=8), tp_size=4, codec=preset
    )
    batches = sequences(tokenizer, MODEL / "scoring.txt", length=128, limit=2)
    reference = [log_probs(model, ids) for ids in batches]
    kl, reports = [], []
    for _ in range(2):
        with narrowcast.attach(model, plan, simulate=True) as handle:
            kl.append(compare(reference, [log_probs(model, ids) for ids in batches], batches).kl_nats)
            reports.append(handle.report())
        unguarded()
        plan = Plan.from_bytes(plan.to_bytes(), "plan")  # with codecs that have not been used yet
    assert kl[0] < kl[1]
    assert reports[0].num_guarded > 0 == reports[1].num_guarded
    assert reports[0].num_saturated < 1.01 * reports[1].num_saturated
    assert Report.from_json(reports[0].to_json()) == reports[0]


# --- Blocks of features, counters ------------------------------------------------------------------------------------


def test_a_block_of_features_is_guarded_by_itself() -> None:
    """Features 0 to 127 hold an outlier and 64 to 127 none: the first block is guarded, the second clips."""
    codec = unit_codec(128, 3)
    x_TE = torch.full((1, 128), 100.0)
    whole_TE = roundtrip(codec, x_TE)
    assert torch.equal(whole_TE, x_TE)  # the farthest value has a code of its own
    assert torch.equal(roundtrip(codec.features(0, 64), x_TE[:, :64]), x_TE[:, :64])
    assert torch.equal(roundtrip(codec.features(64, 128), x_TE[:, 64:]), torch.full((1, 64), 7.0))
    x_TE[:, :64] = 1.0
    assert guarded(codec, x_TE) == [True] and guarded(codec.features(0, 64), x_TE[:, :64]) == [False]


def test_the_summary_tells_of_guarded_tokens() -> None:
    site = SiteReport(
        coded=True, num_tokens=9, wire_bytes=90, plain_bytes=360, num_values=180, num_saturated=3, num_guarded=2
    )
    told = summary(Report(sites={"site": site}), Split(tp_size=2))
    assert told.endswith("; 3 values clipped on all ranks; 2 tokens coded by the guard (far out of range)")
    quiet = summary(Report(sites={"site": replace(site, num_guarded=0)}), Split(tp_size=2))
    assert "guard" not in quiet


def drifted(world_size: int, *shape: int) -> list[Tensor]:
    """Partial sums, of some tokens far out of range on some ranks."""
    inputs = partials(world_size, *shape)
    for rank, x_TE in enumerate(inputs):
        x_TE[rank % 3 :: 2] *= 40
    return inputs


def check_drift(algorithm: str, groups: list[list[int]]) -> list[int]:
    """Real ranks against the twin, counters too; how many tokens the ranks guarded, by shape."""
    transport, num_guarded = TorchDistributedTransport(), []
    for shape in ((1, 300), (2, 300), (17, 300)):
        x_RTE = torch.stack(partials(transport.world_size, 30, shape[1], seed=1))
        partial, reduced = calibrated("int4-feature", x_RTE)
        nodes_NTE = torch.stack([x_RTE[group].sum(dim=0) for group in groups or [[0]]])
        hops = checked_hops((partial, reduced, calibrated("int4-feature", nodes_NTE)[0]), len(x_RTE), groups)
        inputs, stats = drifted(transport.world_size, *shape), torch.zeros(2, 3, dtype=torch.int64)
        assert choose(algorithm, hops, *shape, transport.world_size) == algorithm
        steps = all_reduce_steps(inputs[transport.rank], hops, transport, algorithm, stats[0])
        found = Pending(steps, transport).wait()
        expected = simulate.all_reduce(inputs, codec=hops.codecs, groups=groups, algorithm=algorithm, stats=stats[1])
        assert same_bits(found, expected), (algorithm, shape)
        dist.all_reduce(stats[0])
        assert stats[0].tolist() == stats[1].tolist()
        num_guarded.append(stats[0, GUARDED].item())
    return num_guarded


@pytest.mark.parametrize(
    ("world_size", "algorithm", "groups"),
    [
        (3, "one_shot", []),
        (3, "two_shot", []),
        (5, "two_shot", []),
        (4, "hierarchical", [[0, 1], [2, 3]]),
        (5, "hierarchical", [[4, 1], [0, 2, 3]]),
    ],
)
def test_ranks_equal_the_twin_in_what_they_guard(
    ranks: Pools, world_size: int, algorithm: str, groups: list[list[int]]
) -> None:
    for num_guarded in ranks(world_size).run(check_drift, algorithm, groups):
        assert all(num_guarded)


def test_with_fewer_tokens_than_ranks_blocks_are_guarded_each_for_itself() -> None:
    """The twin cuts as ranks do: a block without outliers clips, though its token is guarded among all features."""
    partial = FeatureCodec(num_bits=4, scale=torch.ones(2, 128, dtype=torch.bfloat16), outliers=torch.tensor([3]))
    codecs = partial, unit_codec(128, 3)
    one = simulate.all_reduce([torch.full((1, 128), 100.0)] * 2, codec=codecs, algorithm="two_shot")
    assert one.tolist() == [[200.0] * 64 + [7.0] * 64]
    two = simulate.all_reduce([torch.full((2, 128), 100.0)] * 2, codec=codecs, algorithm="two_shot")
    assert two.tolist() == [[200.0] * 128] * 2
