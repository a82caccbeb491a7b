"""Reading a GGUF file's metadata quickly: Transformers makes a config and a tokenizer of it.

The package `gguf` makes two numpy views of the mapped file for each word of a vocabulary: 2 s for 50,000 words, for
every config, tokenizer and rank. A reader of ours gives Transformers the same words in a quarter of that.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_metadata() -> Iterator[None]:
    """Let the quick reader stand in for the package's inside the context, for files whose headers were checked."""
    import gguf

    slow = gguf.GGUFReader
    string, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY

    class QuickReader(slow):  # type: ignore[misc, valid-type]
        """As the package's; of an array's values it gives plain bytes or numbers, where Transformers looks at both."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != array:
                found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
                return found
            kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
            place, inner = orig_offs + 12, gguf.GGUFValueType(kind)
            if inner == string:
                parts, place = _words(memoryview(self.data), place, count)
            else:
                values = self._get(place, self.gguf_scalar_to_np[inner], count)
                parts, place = list(values.reshape(-1, 1)), place + values.nbytes
            return place - orig_offs, parts, list(range(len(parts))), [array, inner] if parts else [array]

    vars(gguf)["GGUFReader"] = QuickReader  # which Transformers imports when it reads
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = slow


def _words(data: memoryview, place: int, count: int) -> tuple[list[bytes], int]:
    """The bytes of words, each behind its length, and the place behind them."""
    words = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, place)
        words.append(bytes(data[place + 8 : place + 8 + length]))
        place += 8 + length
    return words, place
