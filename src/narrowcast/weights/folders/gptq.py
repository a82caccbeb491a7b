"""Folders that AutoGPTQ and GPTQModel write: 4 bits, or 8 bits that are symmetric.

A layer has `qweight` int32 [K * bits / 32, N], `qzeros` int32 [G, N * bits / 32], `scales` [G, N], and `g_idx` int32
[K], the group of each column. A word holds 32 / bits codes of neighbouring columns (zero points: of rows), the first
one in the lowest bits. A value is scale * (code - zero); checkpoint format `gptq` has zero - 1 in the file, modulo
2 ** bits, `gptq_v2` zero.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from narrowcast.weights.folders.packed import (
    SCALES,
    WORD,
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
    wrong_setting,
)
from narrowcast.weights.folders.tensors import Tensors
from narrowcast.weights.formats import Q8_0, GroupedCodes, w4a16
from narrowcast.weights.parts import group_span, span


class GptqWeight:
    """A `PackedWeight` of GPTQ. `zero_offset`: what is to be added to zero points in the file."""

    def __init__(self, tensors: Tensors, layer: str, num_bits: int, zero_offset: int) -> None:
        self._tensors, self._layer, self._zero_offset = tensors, layer, zero_offset
        self._per_word = WORD // num_bits
        num_words, num_rows = shape_of(tensors, f"{layer}.qweight")
        num_groups, _ = shape_of(tensors, f"{layer}.scales")
        num_columns = num_words * self._per_word
        check_part(tensors, f"{layer}.qweight", ("I32",), (num_words, num_rows))
        check_part(tensors, f"{layer}.qzeros", ("I32",), (num_groups, -(-num_rows // self._per_word)))
        check_part(tensors, f"{layer}.scales", SCALES if num_bits == 4 else ("F16",), (num_groups, num_rows))
        self._group_size = group_size(tensors, layer, num_columns, num_groups)
        check_order(tensors, f"{layer}.g_idx", num_columns, self._group_size)
        self.parts = {f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
        self.shape = num_rows, num_columns
        self.format = w4a16(self._group_size) if num_bits == 4 else Q8_0

    def codes(self, rows: slice, columns: slice) -> GroupedCodes:
        """Some rows, whole groups of columns."""
        num_rows, num_columns = self.shape
        top, bottom = span(rows, num_rows)
        start, stop = group_span(columns, num_columns, self.format.group_size)
        words = whole_words(start, stop, self._per_word)
        packed = self._tensors.read(f"{self._layer}.qweight", words, slice(top, bottom))
        codes_NK = unpacked(packed.T, self.format.num_bits)
        groups = whole_words(start, stop, self._group_size)
        scales_NG = self._tensors.read(f"{self._layer}.scales", groups, slice(top, bottom)).T
        zeros_NG = self._zeros(groups, (top, bottom))
        if self.format.offset == "zero_point":
            return GroupedCodes(self.format, codes_NK, scales_NG.contiguous(), zeros_NG)
        if (zeros_NG != self.format.middle).any():
            raise wrong_setting(self._tensors, f"8 bits: zero points in {self._layer}", "in the middle", "others")
        group = torch.arange(start, stop, self.format.group_size) // self._group_size - groups.start
        return GroupedCodes(self.format, codes_NK, scales_NG[:, group])

    def _zeros(self, groups: slice, rows: tuple[int, int]) -> Tensor:
        """Zero points of some rows."""
        num_bits, name = self.format.num_bits, f"{self._layer}.qzeros"
        stored = packed_rows(lambda words: self._tensors.read(name, groups, words), num_bits, rows)
        return stored.add(self._zero_offset).bitwise_and((1 << num_bits) - 1)


def gptq(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The weights of a folder by name; InvalidInputError for settings that are not known here."""
    num_bits = config.get("bits")
    check_setting(tensors, "bits", num_bits, 4, 8)
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    check_setting(tensors, "checkpoint_format", layout, "gptq", "gptq_v2")
    check_setting(tensors, "is_marlin_format", config.get("is_marlin_format", False), False)
    if num_bits == 8:
        check_setting(tensors, "8 bits: sym", config.get("sym"), True)
    zero_offset = 1 if layout == "gptq" else 0
    return {
        f"{layer}.weight": GptqWeight(tensors, layer, cast(int, num_bits), zero_offset)
        for layer in layers(tensors, "qweight")
    }
