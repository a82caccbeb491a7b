"""The costs of transforms for a model of Llama 2 7B's shape over 8 ranks, by form: bytes and multiply-adds.

usage: python benchmarks/transform_costs.py [--json FILE]

Counted from shapes, nothing is run. A plan holds each site's matrices and its codecs' scales, orders and widths. A rank
computes its own components in place of the row-parallel product, and then the synthesis of all features; between the
hops of two_shot it may mix its share of the tokens. Multiply-adds are of one rank and token, over those of the
row-parallel products without a plan.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import reporting
import torch
from torch import Tensor

from narrowcast.codecs.allocation import BLOCK
from narrowcast.plan.transform import Part, Remix, Transform

LAYERS, HIDDEN, RANKS = 32, 4096, 8
INPUTS = {"o_proj": 4096, "down_proj": 11008}  # columns of the row-parallel weights, over all ranks


class Costs(NamedTuple):
    """Of one site: bytes in the plan, bytes of a rank's folded weights, multiply-adds of a rank for one token."""

    plan_nbytes: int
    folded_nbytes: int
    product: float
    one_shot: int
    two_shot: float


def empty(*shape: int) -> Tensor:
    """A matrix that has a shape alone."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def of_site(num_features: int, num_components: int) -> Transform:
    part = Part(
        start=0,
        rank=None,
        analysis=empty(num_components, num_features),
        synthesis=empty(num_features, num_components),
    )
    return Transform(num_features=num_features, parts=(part,))


def of_blocks(num_features: int, size: int) -> Transform:
    sizes = [min(size, num_features - start) for start in range(0, num_features, size)]
    parts = [
        Part(start=place * size, rank=None, analysis=empty(each, each), synthesis=empty(each, each))
        for place, each in enumerate(sizes)
    ]
    return Transform(num_features=num_features, parts=tuple(parts))


def of_ranks(num_features: int, num_ranks: int, each: int, num_reduced: int) -> Transform:
    parts = [
        Part(start=0, rank=rank, analysis=empty(each, num_features), synthesis=empty(num_features, each))
        for rank in range(num_ranks)
    ]
    remix = Remix(mix=empty(num_reduced, num_ranks * each), synthesis=empty(num_features, num_reduced))
    return Transform(num_features=num_features, parts=tuple(parts), remix=remix)


def codec_nbytes(num_sources: int, num_features: int) -> int:
    """An `allocated` codec's scales (bf16), orders (int32) and widths of blocks (uint8)."""
    return num_sources * ((2 + 4) * num_features + -(-num_features // BLOCK))


def plan_nbytes(transform: Transform | None, num_features: int, num_ranks: int) -> int:
    """Bytes of a site's tensors in a plan."""
    if transform is None:
        return codec_nbytes(num_ranks, num_features) + codec_nbytes(1, num_features)
    codecs = codec_nbytes(num_ranks, transform.num_components) + codec_nbytes(1, transform.num_reduced)
    return transform.nbytes + codecs


def costs(transform: Transform | None, num_features: int, num_inputs: int, num_ranks: int) -> Costs:
    nbytes, inputs = plan_nbytes(transform, num_features, num_ranks), num_inputs / num_ranks
    if transform is None:
        return Costs(nbytes, 0, num_features * inputs, 0, 0)
    own = transform.own(0)
    num_own = own.stop - own.start
    synthesis = sum(part.synthesis.numel() for part in transform.parts)
    again: float = synthesis
    if transform.remix is not None:  # a rank mixes the tokens that it adds up
        again = transform.remix.synthesis.numel() + transform.remix.mix.numel() / num_ranks
    return Costs(nbytes, int(2 * num_own * inputs), num_own * inputs, synthesis, again)


def forms(num_inputs: int) -> dict[str, Transform | None]:
    """Forms in which a site of as many inputs may travel; a rank's partial sums span no more axes than that."""
    each = min(HIDDEN, num_inputs // RANKS)
    return {
        "features": None,
        "site, all components": of_site(HIDDEN, HIDDEN),
        "site, half of them": of_site(HIDDEN, HIDDEN // 2),
        "site, a quarter": of_site(HIDDEN, HIDDEN // 4),
        "blocks of 64": of_blocks(HIDDEN, 64),
        "blocks of 512": of_blocks(HIDDEN, 512),
        "ranks, all components": of_ranks(HIDDEN, RANKS, each, HIDDEN),
        "ranks, a quarter": of_ranks(HIDDEN, RANKS, each // 4, HIDDEN // 4),
    }


def rows() -> Iterator[dict[str, Any]]:
    by_input = {name: forms(num_inputs) for name, num_inputs in INPUTS.items()}
    plain = sum(HIDDEN * num_inputs / RANKS for num_inputs in INPUTS.values())
    for form in by_input["o_proj"]:
        sites = [costs(by_input[name][form], HIDDEN, num_inputs, RANKS) for name, num_inputs in INPUTS.items()]
        plan, folded, product, one_shot, two_shot = (sum(each) for each in zip(*sites, strict=True))
        yield {
            "form": form,
            "plan_mib": LAYERS * plan / 2**20,
            "folded_mib_a_rank": LAYERS * folded / 2**20,
            "product": product / plain,
            "synthesis_one_shot": one_shot / plain,
            "synthesis_two_shot": two_shot / plain,
        }


def main() -> None:
    arguments = reporting.parser(__doc__).parse_args()
    table = list(rows())
    print("| form | plan, MiB | folded weights, MiB a rank | products | + synthesis (one_shot) | + (two_shot) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in table:
        print(
            "| {form} | {plan_mib:.1f} | {folded_mib_a_rank:.0f} | {product:.2f} | {synthesis_one_shot:.2f} "
            "| {synthesis_two_shot:.2f} |".format(**row)
        )
    reporting.write(arguments.json, rows=table)


if __name__ == "__main__":
    main()
