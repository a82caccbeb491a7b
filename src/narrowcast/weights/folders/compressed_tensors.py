"""Folders that compressed-tensors writes, W4A16: 4 bits, `pack-quantized`.

A layer has `weight_packed` int32 [N, K / 8], `weight_scale` [N, G], `weight_shape` [2], and, unless it is symmetric,
`weight_zero_point` int32 [N / 8, G], whose words hold 8 rows. The first code is in the lowest bits; codes and zero
points are 8 more than the signed numbers that they stand for. A value is scale * (code - zero); a zero not told is 8.
"""

from collections.abc import Mapping
from typing import Any

import torch

from narrowcast.weights.folders.packed import (
    SCALES,
    PackedWeight,
    check_order,
    check_part,
    check_setting,
    group_size,
    layers,
    packed_rows,
    shape_of,
    unpacked,
    whole_words,
)
from narrowcast.weights.folders.tensors import Tensors
from narrowcast.weights.formats import GroupedCodes, w4a16
from narrowcast.weights.parts import group_span, span

LAYOUT = "pack-quantized"
PER_WORD = 8


class CompressedWeight:
    """A `PackedWeight` of compressed-tensors."""

    def __init__(self, tensors: Tensors, layer: str) -> None:
        self._tensors, self._layer = tensors, layer
        _, num_groups = shape_of(tensors, f"{layer}.weight_scale")
        check_part(tensors, f"{layer}.weight_shape", ("I64", "I32"), (2,))
        num_rows, num_columns = tensors.read(f"{layer}.weight_shape").tolist()
        check_part(tensors, f"{layer}.weight_packed", ("I32",), (num_rows, -(-num_columns // PER_WORD)))
        check_part(tensors, f"{layer}.weight_scale", SCALES, (num_rows, num_groups))
        self._has_zeros = f"{layer}.weight_zero_point" in tensors.names
        if self._has_zeros:
            check_part(tensors, f"{layer}.weight_zero_point", ("I32",), (-(-num_rows // PER_WORD), num_groups))
        size = group_size(tensors, layer, num_columns, num_groups)
        check_order(tensors, f"{layer}.weight_g_idx", num_columns, size)
        parts = "packed", "scale", "shape", "zero_point", "g_idx"
        self.parts = {f"{layer}.weight_{part}" for part in parts}
        self.shape = num_rows, num_columns
        self.format = w4a16(size)

    def codes(self, rows: slice, columns: slice) -> GroupedCodes:
        """Some rows, whole groups of columns."""
        num_rows, num_columns = self.shape
        top, bottom = span(rows, num_rows)
        start, stop = group_span(columns, num_columns, self.format.group_size)
        words = whole_words(start, stop, PER_WORD)
        groups = slice(start // self.format.group_size, stop // self.format.group_size)
        packed = self._tensors.read(f"{self._layer}.weight_packed", slice(top, bottom), words)
        scales_NG = self._tensors.read(f"{self._layer}.weight_scale", slice(top, bottom), groups)
        if self._has_zeros:
            name = f"{self._layer}.weight_zero_point"
            zeros_NG = packed_rows(lambda words: self._tensors.read(name, words, groups).T, 4, (top, bottom))
        else:
            zeros_NG = torch.full(scales_NG.shape, self.format.middle, dtype=torch.uint8)
        return GroupedCodes(self.format, unpacked(packed, 4), scales_NG, zeros_NG)


def compressed_tensors(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The weights of a folder by name; InvalidInputError for settings that are not known here."""
    check_setting(tensors, "format", config.get("format"), LAYOUT)
    check_setting(tensors, "quantization_status", config.get("quantization_status", "compressed"), "compressed")
    for name in ("kv_cache_scheme", "transform_config"):
        check_setting(tensors, name, config.get(name) or None, None)
    sparsity = _object(config.get("sparsity_config"))
    check_setting(tensors, "sparsity_config", sparsity.get("format", "dense"), "dense")
    for scheme in map(_object, _object(config.get("config_groups")).values()):
        weights = _object(scheme.get("weights"))
        check_setting(tensors, "num_bits", weights.get("num_bits"), 4)
        check_setting(tensors, "type", weights.get("type", "int"), "int")
        check_setting(tensors, "format", scheme.get("format") or LAYOUT, LAYOUT)
        for name in ("input_activations", "output_activations"):
            check_setting(tensors, name, scheme.get(name), None)
    return {f"{layer}.weight": CompressedWeight(tensors, layer) for layer in layers(tensors, "weight_packed")}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
