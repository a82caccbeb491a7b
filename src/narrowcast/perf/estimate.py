"""Bytes that a split model would send by each of some codecs, and their time on a link, before there are ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from narrowcast.codecs import recipe
from narrowcast.collectives import Hops
from narrowcast.engines import check_length, load_engine
from narrowcast.launch import Link
from narrowcast.perf.census import census
from narrowcast.perf.cost import CostModel, measure_coding, plain_coding
from narrowcast.perf.forward import Forward, ways
from narrowcast.plan.decisions import Choice
from narrowcast.plan.split import Split
from narrowcast.progress import told
from narrowcast.transport import check_transport

UNCOMPRESSED, NATIVE = "bf16", "native"
MESH = "tcp"  # what "auto" takes on the CPU
CODECS = "int8-feature", "int6-feature", "int4-feature"
INPUT_LEN = 512


@dataclass(frozen=True, kw_only=True)
class SiteEstimate:
    """Payload bytes that the first rank (of each stage) sends at `number` sites alike: for the prompt, then a token."""

    site: str
    kind: str
    number: int
    prompt_bytes: int
    token_bytes: int


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Milliseconds on the wire and in codecs by one algorithm; None where its work is unknown.

    `algorithm`: "native" for the group's own sums; "" where nothing is summed.
    `pays_from_bytes`: the smallest BF16 tensor whose sum is faster than a native one; None if none up to 1 GiB is.
    """

    algorithm: str
    prompt_ms: float | None
    token_ms: float | None
    pays_from_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CodecEstimate:
    """Traffic by one codec; `times` only where a link is given."""

    codec: str
    bits_per_value: float
    sites: Sequence[SiteEstimate]
    times: Sequence[TimeEstimate] = ()


def estimate(
    model: str | Path,
    split: Split,
    codecs: Sequence[str] = CODECS,
    *,
    input_len: int = INPUT_LEN,
    link: Link | None = None,
    transport: str = "auto",
) -> list[CodecEstimate]:
    """Bytes, and on a `link` times, of a prompt of `input_len` tokens and of each token after it: plain BF16 first.

    `model`: a folder or hub name, of which the config is all that is read. Only where tokens travel to experts does the
    model itself run, as its routers say how many. What coding costs is measured on this machine, on one thread.
    Raises InvalidInputError for a model, a codec or a length that cannot be served.
    """
    recipes = {name: recipe(name) for name in dict.fromkeys((UNCOMPRESSED, *codecs))}
    skeleton = checked_skeleton(model, split, input_len, transport)
    flows = [(census(skeleton, split, num_tokens), num_tokens) for num_tokens in (input_len, 1)]
    found = []
    for name, chosen in told(list(recipes.items()), "estimating codecs"):
        prompt, token = (Forward.of(each, chosen, split, num_tokens) for each, num_tokens in flows)
        times = [] if link is None else list(_times(name, prompt, token, link, transport, split.tp_size))
        sites = list(_sites(prompt, token))
        found.append(CodecEstimate(codec=name, bits_per_value=prompt.bits_per_value(), sites=sites, times=times))
    return found


def checked_skeleton(model: str | Path, split: Split, input_len: int, transport: str) -> nn.Module:
    """A model to be counted, in BF16; InvalidInputError for a transport or a length that there is not."""
    check_transport(transport)
    engine = load_engine()
    found = engine.load(model) if split.experts == "all_to_all" else engine.skeleton(model)
    check_length("--input-len", found, input_len)
    return found.to(torch.bfloat16)


def _sites(prompt: Forward, token: Forward) -> Iterator[SiteEstimate]:
    for site in dict.fromkeys(part.flow.site for part in prompt.parts):
        here = [part.flow for part in prompt.parts if part.flow.site == site]
        yield SiteEstimate(
            site=site,
            kind=here[0].kind,
            number=sum(flow.times for flow in here),
            prompt_bytes=prompt.nbytes(site),
            token_bytes=token.nbytes(site),
        )


def _times(
    name: str, prompt: Forward, token: Forward, link: Link, transport: str, world_size: int
) -> Iterator[TimeEstimate]:
    """Native sums beside uncompressed ones by our algorithms; those of each codec by each algorithm."""
    sums = [part for part in prompt.parts if part.flow.kind == "sum"]
    flow, codecs, _ = (sums or prompt.parts)[0]
    cost = CostModel(
        hops=Hops(codecs),
        num_features=flow.num_features,
        world_size=world_size,
        link=link,
        transport=MESH if transport == "auto" else transport,
        coded=measure_coding(codecs[0], flow.num_features),
        plain=plain_coding(flow.num_features),
    )
    native = [Choice(NATIVE)] if name == UNCOMPRESSED else []
    for way in [*native, *ways("coded")] if sums else [None]:
        seconds = [forward.seconds(cost, way) for forward in (prompt, token)]
        prompt_ms, token_ms = (None if each is None else 1e3 * each for each in seconds)
        yield TimeEstimate(
            algorithm="" if way is None else way.algorithm or NATIVE,
            prompt_ms=prompt_ms,
            token_ms=token_ms,
            pays_from_bytes=None if way is None or way.form == NATIVE else cost.break_even_nbytes(way),
        )
