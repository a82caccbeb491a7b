"""A plan at work: products of any make, on real and on virtual ranks; time beside bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from models import calibrated
from narrowcast.codecs import AllocatedRecipe, Codec, Ranges, TransformCodec
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.products import Dense, Product
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks

NUM_FEATURES, NUM_INPUTS, CPU = 64, 24, torch.device("cpu")


@dataclass(frozen=True)
class LowRank:
    """Weights as a product of two thin matrices."""

    up: Tensor
    down: Tensor
    num_features: int = NUM_FEATURES
    dtype: torch.dtype | None = None

    def __call__(self, x_TF: Tensor, num_tokens: int) -> Tensor:
        return linear(linear(x_TF, self.down), self.up)


@dataclass(frozen=True)
class Int8:
    """Weights as integers with a scale for each output, multiplied in FP32, for sums in BF16."""

    codes: Tensor
    scale_E1: Tensor
    num_features: int = NUM_FEATURES
    dtype: torch.dtype | None = torch.bfloat16

    def __call__(self, x_TF: Tensor, num_tokens: int) -> Tensor:
        return linear(x_TF.float(), self.codes.float() * self.scale_E1).bfloat16()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def product_of(make: str, rank: int) -> Product:
    if make == "low rank":
        return LowRank(random(NUM_FEATURES, 3, seed=rank), random(3, NUM_INPUTS, seed=10 + rank))
    if make == "int8":
        codes = torch.randint(-127, 128, (NUM_FEATURES, NUM_INPUTS), generator=torch.Generator().manual_seed(rank))
        return Int8(codes.to(torch.int8), random(NUM_FEATURES, 1, seed=rank).float() / 100)
    weight = random(NUM_FEATURES, NUM_INPUTS, seed=rank)
    return Dense(lambda: weight, NUM_FEATURES)


def sites(*, transformed: bool = False, timed: bool = False, sample_every: int = 0) -> Sites:
    """A site `s` of coded sums of two ranks, of all components along other axes if `transformed`."""
    codecs: tuple[Codec, ...] = calibrated("int8-feature", 20 * random(2, 30, NUM_FEATURES, seed=7))
    if transformed:
        axes = torch.linalg.qr(random(NUM_FEATURES, NUM_FEATURES, seed=5).float()).Q.bfloat16()[None, None]
        components = AllocatedRecipe(bits=8).codec(Ranges.of(20 * random(2, 30, NUM_FEATURES, seed=7)))
        codecs = (TransformCodec(size=NUM_FEATURES, analysis=axes.mT, synthesis=axes, components=components),)
    return Sites({"s": codecs}, (), "one_shot", CPU, timed=timed, sample_every=sample_every)


def summed(make: str, transformed: bool) -> Tensor:
    transport = TorchDistributedTransport()
    communicator = Communicator(sites(transformed=transformed), tp=transport, pp=None)
    return communicator.row_parallel("s", [product_of(make, transport.rank)])(random(2, 5, NUM_INPUTS, seed=9))


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("make", ["dense", "low rank", "int8"])
def test_a_product_of_any_make_is_summed_alike_on_real_and_virtual_ranks(
    ranks: Callable[[int], Ranks], make: str, transformed: bool
) -> None:
    simulator = Simulator(sites(transformed=transformed), 2)
    products = [product_of(make, rank) for rank in range(2)]
    expected = simulator.row_parallel("s", products)(random(2, 5, NUM_INPUTS, seed=9))
    assert expected.shape == (2, 5, NUM_FEATURES)
    for found in ranks(2).run(summed, make, transformed):
        assert torch.equal(found, expected)
    partials = [product(random(10, NUM_INPUTS, seed=9), 10) for product in products]
    exact = sum(x_TE.float() for x_TE in partials)
    codec = sites(transformed=transformed).hops("s", torch.bfloat16).codecs[0]
    bound = sum(codec.error_bound(x_TE, source=rank) for rank, x_TE in enumerate(partials)).norm()
    rounding = 5 * 2**-8 * sum(x_TE.float().norm() for x_TE in partials)
    assert (expected.view(10, -1).float() - exact).norm() < bound + rounding < exact.norm() / 2


def timed_sums() -> list[dict[str, float]]:
    """Seconds after one sum, and after another one."""
    communicator = Communicator(found := sites(timed=True), tp=TorchDistributedTransport(), pp=None)
    seconds = []
    for _ in range(2):
        communicator.sum([random(40, NUM_FEATURES, seed=1)], "s")
        seconds.append(dict(found.report().sites["s"].seconds))
    return seconds


def test_time_is_counted_where_it_is_asked_for(ranks: Callable[[int], Ranks]) -> None:
    for first, seconds in ranks(2).run(timed_sums):
        assert seconds.keys() == {"encode_s", "decode_s", "recode_s", "exchange_s", "waiting_s"}
        for part in ("encode_s", "decode_s", "exchange_s", "waiting_s"):
            assert seconds[part] > first[part] > 0
        assert seconds["recode_s"] == 0, "one_shot codes no sum again"


@pytest.mark.parametrize("sample_every", [0, 1])
def test_counting_time_changes_no_bits_and_is_off_unless_asked_for(sample_every: int) -> None:
    partials = [random(40, NUM_FEATURES, seed=rank) for rank in range(2)]
    plain, timed = sites(), sites(timed=True, sample_every=sample_every)
    assert torch.equal(Simulator(plain, 2).sum(partials, "s"), Simulator(timed, 2).sum(partials, "s"))
    assert plain.report().sites["s"].seconds == {}
    assert timed.report().sites["s"].seconds["encode_s"] > 0
