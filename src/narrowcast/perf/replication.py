"""The price of a matrix of the vocabulary on every rank, and what is not sent then, before there are ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from narrowcast.codecs import recipe
from narrowcast.engines import Weights, load_engine
from narrowcast.launch import Link
from narrowcast.perf.census import census
from narrowcast.perf.cost import CostModel, plain_coding
from narrowcast.perf.estimate import INPUT_LEN, MESH, UNCOMPRESSED, checked_skeleton
from narrowcast.perf.forward import Forward, ways
from narrowcast.perf.tune import weights_gbps
from narrowcast.plan.split import UNCODED, Split
from narrowcast.runtime.sites import plain

MATRICES: Mapping[str, str] = dict(zip(UNCODED, ("embedding", "output layer"), strict=True))


@dataclass(frozen=True, kw_only=True)
class ReplicationEstimate:
    """One `matrix` on each rank: bytes that it holds more, and reads more for each forward, with their time here.

    `prompt_bytes`, `token_bytes`: that the first rank does not send; `prompt_ms`, `token_ms`: their time on a link.
    """

    matrix: str
    held_bytes: int
    read_bytes: int
    read_ms: float
    prompt_bytes: int
    token_bytes: int
    prompt_ms: float | None = None
    token_ms: float | None = None


def replication(
    model: str | Path,
    split: Split,
    *,
    input_len: int = INPUT_LEN,
    link: Link | None = None,
    transport: str = "auto",
    weights: Weights = "stored",
) -> list[ReplicationEstimate]:
    """The estimates of the matrices that ranks share out; where both are one, holding it is the embedding's price.

    `model`: a folder, hub name or GGUF file, of which the config is read, and headers of files that are there;
    `weights`: in what its matrices are kept. Raises as `estimate` does.
    """
    split = replace(split, experts="slices")  # where experts are makes no difference here, and no router has to run
    skeleton = checked_skeleton(model, split, input_len, transport)
    engine = load_engine()
    vocabulary = engine.vocabulary(skeleton).kept_in(engine.matrices(model, weights=weights))
    prompt, token = (census(skeleton, split, num_tokens) for num_tokens in (input_len, 1))
    found = []
    for kind, nbytes in zip(UNCODED, (vocabulary.embedding, vocabulary.output), strict=True):
        of_kind = [[flow for flow in flows if flow.kind == kind] for flows in (prompt, token)]
        if not nbytes or not all(of_kind):
            continue
        more = nbytes * (split.tp_size - 1) // split.tp_size
        read = more if kind == "logits" else 0
        forwards = [
            Forward.of(flows, recipe(UNCOMPRESSED), split, num_tokens)
            for flows, num_tokens in zip(of_kind, (input_len, 1), strict=True)
        ]
        sent = [sum(map(forward.nbytes, {part.flow.site for part in forward.parts})) for forward in forwards]
        times = [None, None] if link is None else [_ms(forward, link, transport, split) for forward in forwards]
        found.append(
            ReplicationEstimate(
                matrix=MATRICES[kind],
                held_bytes=0 if kind == "logits" and vocabulary.tied else more,
                read_bytes=read,
                read_ms=read / (weights_gbps(torch.bfloat16, 1) * 1e6),
                prompt_bytes=sent[0],
                token_bytes=sent[1],
                prompt_ms=times[0],
                token_ms=times[1],
            )
        )
    return found


def _ms(forward: Forward, link: Link, transport: str, split: Split) -> float | None:
    """Milliseconds in which what travels as it is arrives, added up by the faster algorithm where it is a sum."""
    num_features = forward.parts[0].flow.num_features
    coding = plain_coding(num_features)
    cost = CostModel(
        hops=plain(torch.bfloat16),
        num_features=num_features,
        world_size=split.tp_size,
        link=link,
        transport=MESH if transport == "auto" else transport,
        coded=coding,
        plain=coding,
    )
    seconds = forward.seconds(cost, ways("coded")[0])
    return None if seconds is None else 1e3 * seconds
