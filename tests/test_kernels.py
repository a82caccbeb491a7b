"""Every path of the C++ kernels against the reference, bit for bit; threads; what checks keep away from them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import test_golden
from formats import FORMATS
from narrowcast.codecs import AllocatedCodec, Codec, Ranges, kernels, recipe, token_scale
from narrowcast.codecs.feature_reference import GUARD_MARK as MARK
from narrowcast.codecs.kernels import REFERENCE, cpu
from narrowcast.errors import InvalidInputError

PATHS = [path for path in kernels.available() if path != REFERENCE]
compiled = pytest.mark.skipif(not PATHS, reason="the compiled module is not installed")
every_format = pytest.mark.parametrize("preset", FORMATS)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
# Sizes around those of vectors and groups.
features = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 129, 255, 256, 500, 1025]))

GUARD_MARK = torch.tensor([MARK], dtype=torch.uint16).view(torch.uint8)

# What each kind of values does to [R, T, E] of ordinary ones, given a generator.
KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "ordinary": lambda x, _: x,
    "ties": lambda x, _: (x * 4).round() / 2,
    "zeros": lambda x, g: torch.where(torch.rand(x.shape, generator=g) < 0.7, x.sign() * 0.0, x),
    "all magnitudes": lambda x, g: x * torch.exp2(torch.randint(-140, 127, x.shape, generator=g).float()),
    "subnormal": lambda x, _: x * 1e-38,
    "huge": lambda x, _: x.clamp(-1, 1) * 3.3e38,
    "not finite": lambda x, g: x / (torch.rand(x.shape, generator=g) > 0.1) * (torch.rand(x.shape, generator=g) > 0.05),
    "nothing finite": lambda x, _: x * torch.inf,
    "tokens far out": lambda x, g: x * 40.0 ** (torch.rand(x.shape[:2], generator=g) < 0.5)[..., None],
    "values far out": lambda x, g: torch.where(torch.rand(x.shape, generator=g) < 0.01, x * 1e3, x),
}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def strided(x: Tensor) -> Tensor:
    """The same values with other values between its rows, and before them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 1, dtype=x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def outcome(codec: Codec, reduced: Codec, x_RTE: Tensor, noise_RTB: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Everything that kernels can be asked for; of bytes that nothing encodes to, too."""
    num_ranks, num_tokens, num_features = x_RTE.shape
    counts = torch.zeros(3, 3, dtype=torch.int64)
    payloads_RTB = strided(torch.zeros(num_ranks, num_tokens, codec.row_nbytes(num_features), dtype=torch.uint8))
    for rank, x_TE in enumerate(x_RTE):
        codec.encode(strided(x_TE), source=rank, out=payloads_RTB[rank], stats=counts[0])
    found = []
    for each_RTB in (payloads_RTB, noise_RTB):
        sum_TE = strided(torch.zeros(num_tokens, num_features, dtype=dtype))
        found.append(codec.decode_sum(each_RTB, out=sum_TE))
        last = num_ranks - 1
        found.append(codec.decode(each_RTB[last], source=last, num_features=num_features, dtype=dtype))
    recoded_TB = strided(torch.zeros(num_tokens, reduced.row_nbytes(num_features), dtype=torch.uint8))
    codec.recode(payloads_RTB, reduced, num_features=num_features, out=recoded_TB, stats=counts[1])
    residue_TE = strided(x_RTE.float().nan_to_num(0, 0, 0).flip(0)[-1] / 3)
    fed_TB = codec.encode(strided(x_RTE[-1]), source=num_ranks - 1, residue=residue_TE, stats=counts[2])
    return [payloads_RTB, *found, recoded_TB, fed_TB, residue_TE, counts]


@compiled
@every_format
@settings(max_examples=12, deadline=None)
@given(
    num_ranks=st.integers(1, 5),
    num_tokens=st.integers(0, 4),
    num_features=features,
    kind=st.sampled_from(list(KINDS)),
    dtype=dtypes,
    seed=st.integers(0, 999),
)
def test_every_path_gives_the_bits_of_the_reference(
    preset: str, num_ranks: int, num_tokens: int, num_features: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_RTE = torch.randn(num_ranks, num_tokens, num_features, generator=generator)
    seen_RTE = x_RTE if num_tokens else torch.ones(num_ranks, 1, num_features)
    codec = recipe(preset).codec(Ranges.of(seen_RTE * 0.8))  # some values clip
    reduced = recipe(preset).codec(Ranges.of(seen_RTE.sum(dim=0, keepdim=True)))
    x_RTE = KINDS[kind](x_RTE, generator).to(dtype)
    shape = num_ranks, num_tokens, codec.row_nbytes(num_features)
    noise_RTB = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    marked_RT = torch.rand(shape[:2], generator=generator) < 0.4
    noise_RTB[..., :2][marked_RT] = GUARD_MARK[: shape[2]]  # noise alone would hardly ever bear it
    with kernels.forced(REFERENCE):
        expected = outcome(codec, reduced, x_RTE, noise_RTB, dtype)
    for path in PATHS:
        with kernels.forced(path):
            found = outcome(codec, reduced, x_RTE, noise_RTB, dtype)
        names = (
            "payloads",
            "sum",
            "last rank",
            "sum of noise",
            "noise of the last",
            "recoded",
            "fed",
            "residue",
            "counts",
        )
        for name, mine, reference in zip(names, found, expected, strict=True):
            assert torch.equal(bits(mine), bits(reference)), f"{path}: {name}"


def mixed(num_sources: int, num_features: int, generator: torch.Generator) -> AllocatedCodec:
    """Blocks of any widths, other ones for each source; every other codec's sources have the same order."""
    shape = num_sources, num_features
    widths = torch.tensor([*range(9), 16], dtype=torch.uint8)
    chosen = torch.randint(0, len(widths), (num_sources, -(-num_features // 32)), generator=generator)
    same = torch.rand((), generator=generator) < 0.5
    order_RE = torch.rand(1 if same else num_sources, num_features, generator=generator).argsort(dim=1)
    return AllocatedCodec(
        scale=torch.exp2(torch.randn(shape, generator=generator) * 4).bfloat16(),
        order=order_RE.int().expand(shape).contiguous(),
        widths=widths[chosen].sort(dim=1, descending=True).values,
    )


@compiled
@settings(max_examples=60, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    num_tokens=st.integers(1, 4),
    num_features=features,
    kind=st.sampled_from(list(KINDS)),
    far=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    dtype=dtypes,
    other=st.sampled_from(["allocated", "bf16", "int4-feature", "group(bits=3, size=32)", "mxfp4"]),
    seed=st.integers(0, 999),
)
def test_allocated_blocks_of_all_widths_on_every_path(
    num_ranks: int, num_tokens: int, num_features: int, kind: str, far: float, dtype: torch.dtype, other: str, seed: int
) -> None:
    """With values far beyond their scales, more of them than a row has room for, and coded again from and to others."""
    generator = torch.Generator().manual_seed(seed)
    codec, reduced = mixed(num_ranks, num_features, generator), mixed(1, num_features, generator)
    x_RTE = torch.randn(num_ranks, num_tokens, num_features, generator=generator)
    first = recipe(other).codec(Ranges.of(x_RTE))
    x_RTE[torch.rand(x_RTE.shape, generator=generator) < far] *= 100
    x_RTE = (KINDS[kind](x_RTE, generator) * codec.scale[:, None]).to(dtype)
    sums = x_RTE.float().nan_to_num(1, 1, 1).sum(dim=0, keepdim=True)
    second = recipe(other).codec(Ranges.of(sums.nan_to_num(1, 1, 1)))  # what is huge may run over, added up
    noises = []
    for each in (codec, first):
        shape = num_ranks, num_tokens, each.row_nbytes(num_features)
        noises.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    noises[0][torch.rand(num_ranks, num_tokens, generator=generator) < 0.5, 0] = token_scale.GUARDED

    def found() -> list[Tensor]:
        return outcome(codec, second, x_RTE, noises[0], dtype) + outcome(first, reduced, x_RTE, noises[1], dtype)

    with kernels.forced(REFERENCE):
        expected = found()
    for path in PATHS:
        with kernels.forced(path):
            for place, (mine, reference) in enumerate(zip(found(), expected, strict=True)):
                assert torch.equal(bits(mine), bits(reference)), f"{path}: {place}"


@compiled
def test_a_tokens_scale_at_the_edge_between_two_codes_on_every_path() -> None:
    """There the last bit of the mean square counts, and so the order in which it is taken."""
    generator = torch.Generator().manual_seed(0)
    codec = mixed(1, 1025, generator)
    order = codec.order[0].long()
    widths_E = codec.widths[0].repeat_interleave(32)[:1025]
    counted = order[(widths_E > 0) & (widths_E < 16)]
    u_TE = torch.randn(20, 1025, generator=generator)
    edge_T = token_scale.TOKEN_SCALES.on(torch.device("cpu")).edges[100:120]
    near_TE = u_TE * (edge_T / token_scale.mean_square(u_TE[:, counted])).sqrt()[:, None]
    steps = 1 + torch.arange(-8, 9)[:, None, None] * 2.0**-23
    x_TE = (near_TE * steps).flatten(0, 1) * codec.scale[0].float()
    with kernels.forced(REFERENCE):
        expected = codec.encode(x_TE, source=0)
    assert len(expected[:, 0].unique()) > 20  # both sides of the edges
    for path in PATHS:
        with kernels.forced(path):
            assert torch.equal(codec.encode(x_TE, source=0), expected), path


@compiled
@pytest.mark.parametrize("path", PATHS)
def test_golden_bytes_on_every_path(path: str) -> None:
    with kernels.forced(path):
        for preset in FORMATS:
            test_golden.test_payloads_are_those_of_the_first_day(preset)


@compiled
@pytest.mark.parametrize("path", PATHS)
@every_format
def test_nothing_beyond_the_buffers_is_written(preset: str, path: str) -> None:
    """Rows lie far apart, and what is between them stays as it was."""
    for num_features in (1, 15, 33, 100, 129):
        codec = recipe(preset).codec(Ranges.of(torch.ones(1, 1, num_features)))
        row_nbytes = codec.row_nbytes(num_features)
        wide_TB = torch.full((4, row_nbytes + 200), 77, dtype=torch.uint8)
        wide_TE = torch.full((4, num_features + 200), 77.0)
        with kernels.forced(path):
            codec.encode(torch.randn(4, num_features), source=0, out=wide_TB[:, 100 : 100 + row_nbytes])
            payload_TB = wide_TB[:, 100 : 100 + row_nbytes].clone()
            codec.decode(payload_TB, source=0, out=wide_TE[:, 100 : 100 + num_features])
        assert (wide_TB[:, :100] == 77).all() and (wide_TB[:, 100 + row_nbytes :] == 77).all()
        assert (wide_TE[:, :100] == 77).all() and (wide_TE[:, 100 + num_features :] == 77).all()


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine of four cores, with one rank."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
    cpu.limit_threads()


def threads_of_this_process() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


@compiled
@pytest.mark.parametrize(
    "preset",
    ["bf16", "int4-feature", "group(bits=3, size=32, spikes=true)", "minifloat(element=e2m3, scale=e8m0, size=32)"],
)
def test_several_threads_give_the_same_bits(preset: str, four_threads: None) -> None:
    x_RTE = torch.randn(2, 1031, 1025, generator=torch.Generator().manual_seed(0))
    x_RTE[0, 1030, 3] = torch.nan
    codec = recipe(preset).codec(Ranges.of(x_RTE[:, :100]))
    noise_RTB = torch.zeros(2, 1031, codec.row_nbytes(1025), dtype=torch.uint8)
    found = outcome(codec, codec.sources((0,)), x_RTE, noise_RTB, torch.float32)
    torch.set_num_threads(1)
    expected = outcome(codec, codec.sources((0,)), x_RTE, noise_RTB, torch.float32)
    assert all(torch.equal(bits(mine), bits(theirs)) for mine, theirs in zip(found, expected, strict=True))


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_start_when_a_large_tensor_needs_them() -> None:
    """In a process of its own: threads once started stay."""
    code = """
import os, torch
os.sched_getaffinity = lambda _: range(4)
count = lambda: len(os.listdir("/proc/self/task"))
from narrowcast.codecs import recipe
torch.set_num_threads(3)
codec, small, large = recipe("bf16"), torch.ones(64, 1024), torch.ones(4096, 1024)
before = count()
codec.encode(small, source=0)
assert count() == before  # small
os.environ["LOCAL_WORLD_SIZE"] = "4"
codec.encode(large, source=0)
assert count() == before  # four ranks share four cores
os.environ["LOCAL_WORLD_SIZE"] = "1"
codec.encode(large, source=0)
assert count() == before + 2  # as PyTorch was told
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@compiled
def test_python_threads_at_once(four_threads: None) -> None:
    x_TE = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    codec = recipe("int4-group128").codec(Ranges.of(x_TE[None]))
    expected = codec.encode(x_TE, source=0)
    with ThreadPoolExecutor(4) as pool:
        payloads = list(pool.map(lambda _: codec.encode(x_TE, source=0), range(40)))
    assert all(torch.equal(each, expected) for each in payloads)


def test_a_path_that_is_not_there_is_refused() -> None:
    before = kernels.selected()
    with pytest.raises(InvalidInputError, match="one of reference"), kernels.forced("sse9"):
        pass
    assert kernels.selected() == before


def test_the_path_is_chosen_inside_the_context_alone() -> None:
    before = kernels.selected()
    assert before == kernels.available()[-1]
    for path in kernels.available():
        with pytest.raises(ZeroDivisionError), kernels.forced(path):
            assert kernels.selected() == path
            raise ZeroDivisionError
        assert kernels.selected() == before


@every_format
def test_buffers_that_do_not_fit_are_refused(preset: str) -> None:
    """An address has no shape: what passes here would be read or written beyond its end."""
    x_TE = torch.ones(2, 64)
    codec = recipe(preset).codec(Ranges.of(x_TE[None]))
    payload_TB = codec.encode(x_TE, source=0)
    row_nbytes = payload_TB.shape[1]
    recode = {"reduced": codec, "num_features": 64}
    short, narrow = payload_TB[:1].clone(), payload_TB[:, :-1].clone()
    for wrong in (short, narrow, payload_TB.to(torch.int64), payload_TB[None]):
        with pytest.raises(InvalidInputError):
            codec.encode(x_TE, source=0, out=wrong)
        with pytest.raises(InvalidInputError):
            codec.recode(payload_TB[None], out=wrong, **recode)
    for wrong in (narrow, payload_TB.to(torch.int64)):
        with pytest.raises(InvalidInputError):
            codec.decode(wrong, source=0, num_features=64)
        with pytest.raises(InvalidInputError):
            codec.recode(wrong[None], out=torch.empty(2, row_nbytes, dtype=torch.uint8), **recode)
    with pytest.raises(InvalidInputError):
        codec.decode_sum(payload_TB[None], out=torch.empty(2, 64, dtype=torch.int32))
    with pytest.raises(InvalidInputError):
        codec.decode_sum(payload_TB[None], out=torch.empty(1, 64))
