"""Folders that AutoAWQ writes: 4 bits, zero points, packed for its kernel `gemm`.

A layer has `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales` [G, N]. A word holds the codes of 8 rows of
the weight, from the lowest bits on those of rows 0, 2, 4, 6, 1, 3, 5, 7. A value is scale * (code - zero).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from narrowcast.weights.folders.packed import (
    SCALES,
    PackedWeight,
    check_part,
    check_setting,
    group_size,
    layers,
    packed_rows,
    shape_of,
)
from narrowcast.weights.folders.tensors import Tensors
from narrowcast.weights.formats import GroupedCodes, w4a16
from narrowcast.weights.parts import group_span, span

PER_WORD = 8
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of rows 0 to 7 in a word


class AwqWeight:
    """A `PackedWeight` of AutoAWQ."""

    def __init__(self, tensors: Tensors, layer: str) -> None:
        self._tensors, self._layer = tensors, layer
        num_columns, num_words = shape_of(tensors, f"{layer}.qweight")
        num_groups, num_rows = shape_of(tensors, f"{layer}.scales")
        check_part(tensors, f"{layer}.qweight", ("I32",), (num_columns, num_words))
        check_part(tensors, f"{layer}.qzeros", ("I32",), (num_groups, num_words))
        check_part(tensors, f"{layer}.scales", SCALES, (num_groups, num_words * PER_WORD))
        self.parts = [f"{layer}.{part}" for part in ("qweight", "qzeros", "scales")]
        self.shape = num_rows, num_columns
        self.format = w4a16(group_size(tensors, layer, num_columns, num_groups))

    def codes(self, rows: slice, columns: slice) -> GroupedCodes:
        """Some rows, whole groups of columns."""
        num_rows, num_columns = self.shape
        top, bottom = span(rows, num_rows)
        start, stop = group_span(columns, num_columns, self.format.group_size)
        groups = slice(start // self.format.group_size, stop // self.format.group_size)
        scales_GN = self._tensors.read(f"{self._layer}.scales", groups, slice(top, bottom))
        codes_NK = self._rows("qweight", slice(start, stop), (top, bottom))
        return GroupedCodes(
            self.format, codes_NK, scales_GN.T.contiguous(), self._rows("qzeros", groups, (top, bottom))
        )

    def _rows(self, part: str, columns: slice, rows: tuple[int, int]) -> Tensor:
        """Rows of codes or of zero points."""
        return packed_rows(lambda words: self._tensors.read(f"{self._layer}.{part}", columns, words), 4, rows, PLACES)


def awq(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The weights of a folder by name; InvalidInputError for settings that are not known here."""
    check_setting(tensors, "bits", config.get("bits"), 4)
    version = config.get("version") or config.get("format") or "gemm"
    check_setting(tensors, "version", version.lower() if isinstance(version, str) else version, "gemm")
    return {f"{layer}.weight": AwqWeight(tensors, layer) for layer in layers(tensors, "qweight")}
