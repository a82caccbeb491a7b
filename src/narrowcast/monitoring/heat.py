"""A map of sites: a row for each kind of sum, a cell for each layer."""

import re
from collections.abc import Iterator, Mapping, Sequence

from narrowcast.plan.summary import short_name

ROW = 50  # cells


def rows(sites: Sequence[str]) -> Iterator[tuple[str, int | None, list[str | None]]]:
    """The name of sums, such as mlp.down_proj; the layer of the first cell; and the site of each, None for none.

    A row has 50 cells at most. Sites outside layers have a row of their own, with one cell and no layer.
    """
    by_kind: dict[str, dict[int, str]] = {}
    for site in sites:
        found = re.search(r"(?:^|\.)(\d+)\.(.+)$", short_name(site))
        if found is None:
            yield short_name(site), None, [site]
        else:
            by_kind.setdefault(found[2], {})[int(found[1])] = site
    last = max((layer for layers in by_kind.values() for layer in layers), default=0)
    for first in range(0, last + 1, ROW):
        for kind, layers in by_kind.items():
            cells = [layers.get(layer) for layer in range(first, min(first + ROW, last + 1))]
            if any(cells):
                yield kind, first, cells


def beyond(figures: Mapping[str, float], most: float) -> list[str]:
    """Sites whose figure is above `most`, the largest first."""
    return sorted((site for site, figure in figures.items() if figure > most), key=figures.__getitem__, reverse=True)
