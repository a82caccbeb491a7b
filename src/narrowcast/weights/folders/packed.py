"""A linear layer's weight as quantizers pack it: several tensors, codes in the bits of 32-bit words.

Shapes: N rows, K columns, G groups of columns that share a scale.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError
from narrowcast.weights.folders.tensors import Tensors
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.refusals import broken, unserved

WORD = 32
SCALES = "F16", "BF16"


class PackedWeight(Protocol):
    """A weight [N, K] that is given in codes. `parts`: the tensors that it takes."""

    @property
    def parts(self) -> Collection[str]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def format(self) -> WeightFormat: ...

    def codes(self, rows: slice, columns: slice) -> GroupedCodes:
        """Some rows, whole groups of columns."""
        ...


def layers(tensors: Tensors, part: str) -> Iterator[str]:
    """The layers that have a tensor of this name."""
    return (name.removesuffix(f".{part}") for name in tensors.names if name.endswith(f".{part}"))


def unpacked(words: Tensor, num_bits: int) -> Tensor:
    """Codes of 4 or 8 bits, uint8 [..., 8 or 4 for a word], of int32 [...]: the lowest bits come first."""
    found = words.reshape(-1).view(torch.uint8)
    codes = found if num_bits == 8 else torch.stack([found & 15, found >> 4], dim=-1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * (WORD // num_bits))


def packed_rows(
    words_of: Callable[[slice], Tensor], num_bits: int, rows: tuple[int, int], places: Sequence[int] | None = None
) -> Tensor:
    """Codes [n, M] of rows from one number to another, of words that hold neighbouring ones.

    `words_of(part)`: int32 [M, words], some of all words. `places`: of the first row, the second, ... in a word.
    """
    per_word = WORD // num_bits
    part = whole_words(*rows, per_word)
    found = unpacked(words_of(part), num_bits)
    if places is not None:
        found = found.reshape(len(found), -1, per_word)[..., places].reshape(found.shape)
    first = part.start * per_word
    return found[:, rows[0] - first : rows[1] - first].T.contiguous()


def whole_words(start: int, stop: int, per_word: int) -> slice:
    """The words in which the codes from `start` to `stop` lie."""
    return slice(start // per_word, -(-stop // per_word))


def check_part(tensors: Tensors, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> None:
    """InvalidInputError unless there is such a tensor."""
    found = (tensors.dtype(name), tensors.shape(name)) if name in tensors.names else None
    if found is None or found[0] not in dtypes or found[1] != shape:
        raise broken(tensors.folder, f"{name} of {' or '.join(dtypes)} {shape}", found or "no such tensor")


def shape_of(tensors: Tensors, name: str) -> tuple[int, int]:
    """The shape of a matrix, of which nothing is empty; InvalidInputError if there is none."""
    shape = tensors.shape(name) if name in tensors.names else ()
    if len(shape) != 2 or 0 in shape:
        raise broken(tensors.folder, f"a matrix {name}", shape or "no such tensor")
    return shape[0], shape[1]


def group_size(tensors: Tensors, layer: str, num_columns: int, num_groups: int) -> int:
    """The columns that share a scale; InvalidInputError for groups that are cut, or no multiples of 32."""
    size, rest = divmod(num_columns, num_groups)
    if rest or not size or size % 32:
        raise unserved(
            tensors.folder,
            f"groups of 32, 64, ... columns in {layer}",
            f"{num_groups} of {num_columns} columns",
            "Quantize it with another group size, or use a GGUF file.",
        )
    return size


def check_order(tensors: Tensors, name: str, num_columns: int, size: int) -> None:
    """InvalidInputError if a tensor, which may be missing, says that columns lie in groups out of their order."""
    if name not in tensors.names:
        return
    check_part(tensors, name, ("I32",), (num_columns,))
    if not torch.equal(tensors.read(name), (torch.arange(num_columns) // size).int()):
        raise unserved(
            tensors.folder,
            "groups of neighbouring columns",
            f"columns in the order of activations, {name}",
            "Use a model quantized with desc_act=False (actorder weight or none).",
        )


def check_setting(tensors: Tensors, name: str, found: object, *known: object) -> None:
    """InvalidInputError for a setting of a quantizer that is none of those that are known."""
    if not any(type(found) is type(each) and found == each for each in known):
        raise wrong_setting(tensors, name, " or ".join(str(each) for each in known), found)


def wrong_setting(tensors: Tensors, name: str, expected: str, found: object) -> InvalidInputError:
    """The error for a setting of a quantizer."""
    return unserved(
        tensors.folder, f"quantization with {name} {expected}", found, "Use a GGUF file, or another quantization of it."
    )
