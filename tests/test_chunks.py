"""Large sums travel in chunks of tokens that take turns: the same bits, and the same bytes, as all at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from narrowcast import InvalidInputError, all_reduce
from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import Hops, Pending, all_reduce_steps, simulate
from narrowcast.collectives.algorithms import named
from narrowcast.collectives.base import Traffic
from narrowcast.collectives.reduce import MAX_CHUNKS, chunks_of
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.products import Dense
from narrowcast.runtime.sites import Sites
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks

NUM_FEATURES = 96


def inputs(world_size: int, num_tokens: int) -> Tensor:
    return torch.randn(world_size, num_tokens, NUM_FEATURES, generator=torch.Generator().manual_seed(3)).bfloat16()


def hops_of(world_size: int, algorithm: str) -> Hops:
    seen = torch.randn(world_size, 64, NUM_FEATURES, generator=torch.Generator().manual_seed(4))
    groups = tuple((rank, rank + 1) for rank in range(0, world_size, 2)) if algorithm == "hierarchical" else ()
    codec = recipe("int4-feature").codec
    sums = torch.stack([seen[list(group)].sum(0) for group in groups]) if groups else seen[:1]
    return Hops(tuple(codec(Ranges.of(each)) for each in (seen, seen.sum(0)[None], sums)), groups)


def chunked_sum(algorithm: str, num_tokens: int, chunk_values: int) -> tuple[Tensor, Traffic, int]:
    transport = TorchDistributedTransport()
    transport.chunk_values = chunk_values  # type: ignore[misc]
    rank, world_size = transport.rank, transport.world_size
    counted: list[Traffic] = []
    x_TE = inputs(world_size, num_tokens)[rank]
    steps = all_reduce_steps(x_TE, hops_of(world_size, algorithm), transport, algorithm, out=x_TE)
    y_TE = Pending(steps, transport, counted.append).wait()
    assert y_TE is x_TE, "in place"
    return y_TE, Traffic(*(sum(figures) for figures in zip(*counted, strict=True))), len(counted)


@pytest.mark.parametrize(
    ("world_size", "algorithm", "num_tokens"),
    [(2, "one_shot", 37), (3, "one_shot", 100), (2, "two_shot", 64), (3, "two_shot", 101), (4, "hierarchical", 53)],
)
def test_chunks_change_neither_bits_nor_bytes(
    ranks: Callable[[int], Ranks], world_size: int, algorithm: str, num_tokens: int
) -> None:
    hops = hops_of(world_size, algorithm)
    expected = simulate.all_reduce(
        list(inputs(world_size, num_tokens)), codec=hops.codecs, algorithm=algorithm, groups=hops.groups
    )
    for rank, (y_TE, traffic, num_exchanges) in enumerate(
        ranks(world_size).run(chunked_sum, algorithm, num_tokens, 1000)
    ):
        assert torch.equal(y_TE, expected)
        sent = named(algorithm).sent(hops, num_tokens, NUM_FEATURES, rank, world_size)
        assert sent is not None and traffic == sent.total
        assert num_exchanges > 3


def test_chunks_are_shared_evenly_and_few() -> None:
    hops = hops_of(4, "two_shot")
    assert chunks_of(hops, 1000, NUM_FEATURES, 4, None) == [slice(0, 1000)]
    assert chunks_of(hops, 1000, NUM_FEATURES, 4, 1000 * NUM_FEATURES) == [slice(0, 1000)]
    assert chunks_of(hops, 7, NUM_FEATURES, 4, 1) == [slice(0, 7)], "two chunks would not be shared evenly"
    assert len(chunks_of(hops, 1003, NUM_FEATURES, 4, 100 * NUM_FEATURES)) == 11
    chunks = chunks_of(hops, 9003, NUM_FEATURES, 4, NUM_FEATURES)
    assert len(chunks) == MAX_CHUNKS
    assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].stop) == (0, 9003)
    assert all(chunk.start % 4 == 0 for chunk in chunks)


def summed_products(num_tokens: int) -> tuple[Tensor, list[str]]:
    """The sum of a layer's products, and in which order products and exchanges were made."""
    transport = TorchDistributedTransport()
    transport.chunk_values = 1000  # type: ignore[misc]
    rank, world_size = transport.rank, transport.world_size
    sites = Sites({"s": hops_of(world_size, "one_shot").codecs}, (), "one_shot", torch.device("cpu"))
    communicator, order = Communicator(sites, tp=transport, pp=None), []
    exchange, linear = transport.exchange, functional.linear
    transport.exchange = lambda *args, **kwargs: (order.append("exchange"), exchange(*args, **kwargs))[1]  # type: ignore[func-returns-value, method-assign]
    functional.linear = lambda *args: (order.append("product"), linear(*args))[1]  # type: ignore[func-returns-value]
    try:
        x_TF = inputs(world_size, num_tokens)[rank].view(1, num_tokens, -1)
        return communicator.row_parallel("s", [Dense(weight_of, NUM_FEATURES)])(x_TF), order
    finally:
        functional.linear = linear


def weight_of() -> Tensor:
    return torch.randn(NUM_FEATURES, NUM_FEATURES, generator=torch.Generator().manual_seed(6)).bfloat16() / 10


def test_products_are_made_while_others_travel(ranks: Callable[[int], Ranks]) -> None:
    partials = [functional.linear(x_TF, weight_of()) for x_TF in inputs(2, 60)]
    expected = simulate.all_reduce(partials, codec=hops_of(2, "one_shot").codecs, algorithm="one_shot")
    for y, order in ranks(2).run(summed_products, 60):
        assert torch.equal(y[0], expected)
        assert len(order) > 8
        assert order == ["product", "exchange"] * (len(order) // 2)


def several_at_once(num_tokens: int) -> list[Tensor]:
    transport = TorchDistributedTransport()
    transport.chunk_values = 1000  # type: ignore[misc]
    rank, world_size = transport.rank, transport.world_size
    codec, x_TE = hops_of(world_size, "two_shot").codecs[:2], inputs(world_size, num_tokens)[rank]
    pending = [
        all_reduce(x_TE, codec=codec, group=transport, algorithm=algorithm, async_op=True)
        for algorithm in ("two_shot", "one_shot", "two_shot")
    ]
    order = (2, 0, 1) if rank else (1, 2, 0)
    waited = {index: pending[index].wait() for index in order}
    return [waited[index] for index in range(3)]


def test_chunked_sums_may_be_under_way_together(ranks: Callable[[int], Ranks]) -> None:
    codecs = hops_of(2, "two_shot").codecs[:2]
    for found in ranks(2).run(several_at_once, 50):
        for y_TE, algorithm in zip(found, ("two_shot", "one_shot", "two_shot"), strict=True):
            assert torch.equal(y_TE, simulate.all_reduce(list(inputs(2, 50)), codec=codecs, algorithm=algorithm))


def wrong_out() -> None:
    x_TE = torch.zeros(4, 8)
    for out in (torch.zeros(4, 9), torch.zeros(4, 8).bfloat16(), torch.zeros(8, 4).T):
        with pytest.raises(InvalidInputError, match="out: expected a contiguous tensor"):
            all_reduce(x_TE, codec=recipe("bf16").codec(Ranges.of(x_TE[None])), out=out)


def test_out_must_be_like_the_input(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(wrong_out)
