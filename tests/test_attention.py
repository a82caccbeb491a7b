"""Attention of few queries: exact softmax attention within a bound; the same bits on every path, for any neighbours."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import REFERENCE, cpu
from narrowcast.runtime import attention_reference
from narrowcast.runtime.attention import MOST_QUERIES, NewTokens, Paged, attend, fits

PATHS = [path for path in kernels.available() if path != REFERENCE]
compiled = pytest.mark.skipif(not PATHS, reason="the compiled module is not installed")
PIECE = attention_reference.PIECE
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Case:
    """What is attended to, [B, H, T, D] over [B, G, C, D], and how."""

    num_sequences: int
    num_kv_heads: int
    group: int
    num_queries: int
    context: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    mask: str = "none"
    softcap: float = 0.0
    causal: bool = False
    new: bool = False
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        num_heads, shape = self.num_kv_heads * self.group, (self.num_sequences, self.num_queries, self.context)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random).to(self.dtype)

        cache = normal(2, self.num_sequences, self.context + 3, self.num_kv_heads, self.head_dim + 8)
        k, v = cache[:, :, 2:-1, :, 8:].transpose(2, 3)  # with other values in between
        found = {"q": normal(self.num_sequences, num_heads, self.num_queries, self.head_dim), "k": k, "v": v}
        seen = torch.rand(shape[0], 1, *shape[1:], generator=random) > 0.3
        if self.mask == "bool":
            found["mask"] = seen
        if self.mask == "padded":  # to the left, and behind
            seen[:], seen[..., : self.context // 3], seen[..., -1:] = True, False, False
            found["mask"] = seen
        if self.mask == "added":
            found["mask"] = torch.where(seen, normal(1, num_heads, *shape[1:]), torch.finfo(self.dtype).min)
        if self.new:
            tokens = self.num_sequences, self.num_kv_heads, self.num_queries, self.head_dim
            turns = 1, self.num_queries, self.head_dim // 8 * 4
            found |= {"new_k": normal(*tokens), "new_v": normal(*tokens), "cos": normal(*turns), "sin": normal(*turns)}
        return found

    def run(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, and the cache with what was written into it."""
        k, v = given["k"].clone(), given["v"].clone()
        new = NewTokens(*(given[name] for name in ("new_k", "new_v", "cos", "sin"))) if self.new else None
        options = {"softcap": self.softcap, "causal": self.causal, "new": new, "mask": given.get("mask")}
        assert fits(given["q"], k, v, given.get("mask"))
        return attend(given["q"], k, v, scale=self.head_dim**-0.5, **options), k, v


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def exact(given: dict[str, Tensor], case: Case) -> Tensor:
    """Softmax attention in FP64 [B, T, H, D]."""
    q, k, v = (given[name].double() for name in "qkv")
    k, v = (x.repeat_interleave(case.group, dim=1) for x in (k, v))
    scores = q @ k.mT * case.head_dim**-0.5
    if case.softcap:
        scores = (scores / case.softcap).tanh() * case.softcap
    if "mask" in given:
        mask = given["mask"]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    if case.causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(case.context - case.num_queries + 1)
    return (scores.softmax(dim=-1).nan_to_num() @ v).transpose(1, 2)


cases = st.builds(
    Case,
    num_sequences=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5]),
    num_queries=st.sampled_from([1, 2, 3, 8, MOST_QUERIES]),
    context=st.one_of(st.integers(MOST_QUERIES, 70), st.sampled_from([PIECE, PIECE + 1, 2 * PIECE + 5])),
    head_dim=st.sampled_from([8, 16, 40, 64, 72, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["none", "bool", "padded", "added"]),
    softcap=st.sampled_from([0.0, 3.0]),
    causal=st.booleans(),
    new=st.booleans(),
    seed=st.integers(0, 9),
)


@compiled
@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_path_gives_the_bits_of_the_reference(case: Case) -> None:
    given = case.tensors()
    with kernels.forced(REFERENCE):
        expected = case.run(given)
    for path in PATHS:
        with kernels.forced(path):
            for have, want in zip(case.run(given), expected, strict=True):
                assert torch.equal(bits(have), bits(want)), path


@settings(max_examples=60, deadline=None)
@given(cases.map(lambda case: replace(case, dtype=torch.float32, new=False)))
def test_attention_is_that_of_fp64_within_rounding(case: Case) -> None:
    """Scores are off by D roundings of their terms at most, exponentials by as much; sums over 512 keys by 512 more.

    Of random values far less: errors add up like their root.
    """
    given = case.tensors()
    found = case.run(given)[0]
    bound = 4 * (math.sqrt(case.head_dim) + math.sqrt(PIECE)) * 2.0**-24 * float(given["v"].abs().max()) * 2
    assert float((found.double() - exact(given, case)).abs().max()) <= bound


@settings(max_examples=20, deadline=None)
@given(cases.map(lambda case: replace(case, dtype=torch.float32, new=False, softcap=0.0, causal=False)))
def test_attention_is_pytorchs(case: Case) -> None:
    given = case.tensors()
    expected = functional.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], given.get("mask"), enable_gqa=True
    )
    torch.testing.assert_close(case.run(given)[0], expected.transpose(1, 2), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_a_head_and_a_sequence_know_nothing_of_others(case: Case) -> None:
    """So that each rank's heads have the bits that they have where one process computes all of them."""
    given = case.tensors()
    whole = case.run(given)[0]
    b, h = case.num_sequences - 1, case.num_kv_heads - 1
    heads = slice(h * case.group, (h + 1) * case.group)
    own = {name: x[b : b + 1] if len(x) > 1 or case.num_sequences == 1 else x for name, x in given.items()}
    own |= {name: own[name][:, h : h + 1] for name in ("k", "v", "new_k", "new_v") if name in own}
    own["q"] = own["q"][:, heads]
    if case.mask == "added":
        own["mask"] = own["mask"][:, heads]
    alone = replace(case, num_sequences=1, num_kv_heads=1).run(own)[0]
    assert torch.equal(bits(alone), bits(whole[b : b + 1, :, heads]))


@compiled
def test_threads_change_no_bit() -> None:
    case = Case(2, 4, 2, 3, 3 * PIECE - 7, 128, mask="padded", new=True)
    given = case.tensors()
    alone = case.run(given)[0]
    threads, affinity = torch.get_num_threads(), cpu.cores_of_this_rank
    try:
        torch.set_num_threads(5)
        cpu.cores_of_this_rank = lambda: 5
        shared = case.run(given)[0]
    finally:
        torch.set_num_threads(threads)
        cpu.cores_of_this_rank = affinity
    assert torch.equal(bits(alone), bits(shared))


def paged_tensors(case: Case, lengths: list[int]) -> tuple[dict[str, Tensor], Paged]:
    """One cache for sequences of these lengths, keys of each anywhere, some in several."""
    random = torch.Generator().manual_seed(case.seed)
    num_keys, own = sum(lengths), replace(case, num_sequences=1, context=max(lengths))
    given = replace(own, context=num_keys + 3, mask="none").tensors()
    q = replace(own, num_sequences=len(lengths)).tensors() | {"k": given["k"], "v": given["v"]}
    places = torch.randint(num_keys + 3, (num_keys + 2,), generator=random)
    ends = torch.tensor(lengths).cumsum(0) + 1
    return q, Paged(places, torch.stack((ends - torch.tensor(lengths), ends), dim=1))


@settings(max_examples=40, deadline=None)
@given(
    cases.filter(lambda case: case.head_dim < 128),
    st.lists(st.sampled_from([MOST_QUERIES, 40, PIECE, PIECE + 1, 2 * PIECE + 5]), min_size=1, max_size=4),
)
def test_paged_attention_has_the_bits_of_each_sequence_alone(case: Case, lengths: list[int]) -> None:
    given, paged = paged_tensors(case, lengths)
    options = {"scale": 0.1, "softcap": case.softcap, "causal": case.causal}
    for path in kernels.available():
        with kernels.forced(path):
            assert fits(given["q"], given["k"], given["v"], given.get("mask"), paged)
            found = attend(given["q"], given["k"], given["v"], mask=given.get("mask"), paged=paged, **options)
            for b, (begin, end) in enumerate(paged.spans.tolist()):
                own = paged.places[begin:end]
                mask = given["mask"][:, ..., : end - begin] if "mask" in given else None
                mask = mask[b : b + 1] if mask is not None and len(mask) > 1 else mask
                k, v = given["k"][:, :, own], given["v"][:, :, own]
                alone = attend(given["q"][b : b + 1], k, v, mask=mask, **options)
                assert torch.equal(bits(found[b : b + 1]), bits(alone)), path


@pytest.mark.parametrize("path", kernels.available())
@pytest.mark.parametrize("place", [-1, 73, 2**40])
def test_places_out_of_the_cache_are_refused(path: str, place: int) -> None:
    given, paged = paged_tensors(Case(2, 2, 1, 1, 1, 64), [30, 40])
    paged.places[50] = place
    with kernels.forced(path), pytest.raises(ValueError, match="keys that are not in the cache"):
        attend(given["q"], given["k"], given["v"], scale=1.0, paged=paged)


@pytest.mark.parametrize("path", kernels.available())
@pytest.mark.parametrize("span", [(-1, 20), (9, 8), (5, 73), (3, 4), (0, 41), (2**62, -(2**62))])
def test_spans_that_are_none_are_refused(path: str, span: tuple[int, int]) -> None:
    """With fewer keys than queries, or more than the mask has, too."""
    given, paged = paged_tensors(Case(2, 2, 1, 2, 1, 64, mask="bool"), [30, 40])
    paged.spans[1] = torch.tensor(span)
    with kernels.forced(path), pytest.raises(ValueError, match="spans that are none"):
        attend(given["q"], given["k"], given["v"], scale=1.0, mask=given["mask"], paged=paged)


def test_places_and_spans_of_another_kind_do_not_fit() -> None:
    given, (places, spans) = paged_tensors(Case(2, 2, 1, 1, 1, 64), [30, 40])
    assert fits(given["q"], given["k"], given["v"], None, Paged(places, spans))
    for other in Paged(places.int(), spans), Paged(places, spans[:1]), Paged(places, spans.mT.contiguous().mT):
        assert not fits(given["q"], given["k"], given["v"], None, other)
    assert not fits(given["q"], *(given[name].expand(2, -1, -1, -1) for name in "kv"), None, Paged(places, spans))


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    case = Case(1, 2, 1, 2, 40, 64, mask="bool")
    given = case.tensors()
    given["mask"][:, :, 0] = False
    found = case.run(given)[0]
    assert found[:, 0].eq(0).all()
    assert found[:, 1].ne(0).any()


@pytest.mark.parametrize("context", [20, PIECE + 20])
def test_what_is_not_finite_comes_out_as_nan(context: int) -> None:
    case = Case(1, 2, 1, 1, context, 64)
    given = case.tensors()
    given["k"][0, 1, context - 3] = torch.nan
    found = case.run(given)[0]
    assert found[0, 0, 1].isnan().all()
    assert found[0, 0, 0].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"num_queries": MOST_QUERIES + 1, "context": 64},
        {"head_dim": 12},
        {"head_dim": 264},
        {"dtype": torch.float64},
        {"context": 2, "num_queries": 3},
    ],
)
def test_others_do_not_fit(change: dict[str, object]) -> None:
    given = replace(Case(1, 2, 2, 1, 20, 64), **change).tensors()
    assert not fits(given["q"], given["k"], given["v"])


@pytest.mark.parametrize("change", [{"cos": 1}, {"new_v": 2}])
def test_new_tokens_of_another_dtype_or_number_do_not_fit(change: dict[str, int]) -> None:
    given = Case(2, 2, 1, 3, 20, 64, new=True).tensors()
    names = "new_k", "new_v", "cos", "sin"
    assert NewTokens(*(given[name] for name in names)).fit(given["q"])
    for name, kind in change.items():
        given[name] = given[name].float() if kind == 1 else given[name][:, :, :2]
    assert not NewTokens(*(given[name] for name in names)).fit(given["q"])
