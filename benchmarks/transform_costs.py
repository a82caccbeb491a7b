"""The costs of transforms for a model of Llama 2 7B's shape over 8 ranks, by form: bytes and multiply-adds.

usage: python benchmarks/transform_costs.py [--json FILE]

Counted from shapes, nothing is run. A plan holds each site's matrices and its codecs' scales, orders and widths.
Multiply-adds are of one rank and token, over those of the row-parallel products without a plan: the analysis of what a
rank puts in, and the synthesis of what it gets; in two_shot, also both of its share of the tokens. Where components
feed back, what a payload lost takes another synthesis.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import reporting

from narrowcast.codecs.allocation import BLOCK

LAYERS, HIDDEN, RANKS = 32, 4096, 8
INPUTS = {"o_proj": 4096, "down_proj": 11008}  # columns of the row-parallel weights, over all ranks


class Hop(NamedTuple):
    """`kept` components along each of so many sets of axes, each of them made of `width` features."""

    num_axes: int
    kept: int
    width: int

    @property
    def product(self) -> int:
        """Multiply-adds of one way of one token along one set of axes."""
        return self.kept * self.width

    def nbytes(self, num_sources: int) -> int:
        """Both matrices in BF16; scales (bf16), orders (int32) and widths of blocks (uint8) of `allocated`."""
        return 4 * self.num_axes * self.product + num_sources * ((2 + 4) * self.kept + -(-self.kept // BLOCK))


class Form(NamedTuple):
    """A site's hops: what ranks put in, and their sum."""

    partial: Hop
    total: Hop

    @property
    def nbytes(self) -> int:
        return self.partial.nbytes(RANKS) + self.total.nbytes(1)

    @property
    def one_shot(self) -> float:
        """Analysis, the own loss where it is fed back, and synthesis."""
        feeds_back = self.partial.num_axes == 1
        return self.partial.product * (1 + feeds_back + self.partial.num_axes)

    @property
    def two_shot(self) -> float:
        """The synthesis of partial sums, and the second analysis and its loss, are of a share of the tokens."""
        return (
            self.one_shot
            - self.partial.product * self.partial.num_axes * (1 - 1 / RANKS)
            + self.total.product * (2 / RANKS + 1)
        )


def forms(num_inputs: int) -> dict[str, Form]:
    """Forms in which a site of as many inputs may travel; a rank's partial sums span no more axes than that."""
    each = min(HIDDEN, num_inputs // RANKS)

    def same(hop: Hop) -> Form:
        return Form(hop, hop)

    return {
        "site, all components": same(Hop(1, HIDDEN, HIDDEN)),
        "site, half of them": same(Hop(1, HIDDEN // 2, HIDDEN)),
        "site, a quarter": same(Hop(1, HIDDEN // 4, HIDDEN)),
        "blocks of 64": same(Hop(1, HIDDEN, 64)),
        "blocks of 512": same(Hop(1, HIDDEN, 512)),
        "ranks, all components": Form(Hop(RANKS, each, HIDDEN), Hop(1, HIDDEN, HIDDEN)),
        "ranks, a quarter": Form(Hop(RANKS, each // 4, HIDDEN), Hop(1, HIDDEN // 4, HIDDEN)),
    }


def rows() -> Iterator[dict[str, Any]]:
    by_input = {name: forms(num_inputs) for name, num_inputs in INPUTS.items()}
    plain = sum(HIDDEN * num_inputs / RANKS for num_inputs in INPUTS.values())
    for form in by_input["o_proj"]:
        sites = [by_input[name][form] for name in INPUTS]
        yield {
            "form": form,
            "plan_mib": LAYERS * sum(each.nbytes for each in sites) / 2**20,
            "one_shot": sum(each.one_shot for each in sites) / plain,
            "two_shot": sum(each.two_shot for each in sites) / plain,
        }


def main() -> None:
    arguments = reporting.parser(__doc__).parse_args()
    table = list(rows())
    print("| form | plan, MiB | one_shot | two_shot |\n| --- | ---: | ---: | ---: |")
    for row in table:
        print("| {form} | {plan_mib:.1f} | {one_shot:.2f} | {two_shot:.2f} |".format(**row))
    reporting.write(arguments.json, rows=table)


if __name__ == "__main__":
    main()
