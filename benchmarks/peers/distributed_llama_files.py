"""A Llama, and a tokenizer for it, as distributed-llama reads them (its converter/ has the format).

A file is a magic number, its header's size, pairs of a key and a value, all int32, and the content. Matrices are Q40,
which is GGUF's Q4_0: a block of 32 is an FP16 scale, and codes of which the low halves of the bytes come first.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from gguf import GGMLQuantizationType, quants
from peers.weights import read_config, read_weights

MODEL_MAGIC, TOKENIZER_MAGIC = 0xA00ABCD, 0x567124
LLAMA, SILU, Q40 = 0xABCD00, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path, path: Path) -> None:
    """Write the model of `folder`: its embedding and norms in FP32, all its other matrices in Q40."""
    config = read_config(folder)
    header = {
        0: 0,  # version
        1: LLAMA,
        2: config["hidden_size"],
        3: config["intermediate_size"],
        4: config["num_hidden_layers"],
        5: config["num_attention_heads"],
        6: config["num_key_value_heads"],
        7: 0,  # experts
        8: 0,  # active ones
        9: config["vocab_size"],
        10: config["max_position_embeddings"],
        11: SILU,
        12: int(config["rope_parameters"]["rope_theta"]),
        13: Q40,
        19: config["head_dim"],
        20: round(-math.log10(config["rms_norm_eps"])),
    }
    with path.open("wb") as file:
        _write_header(file, MODEL_MAGIC, header)
        for name, weight in read_weights(folder):
            wide = weight.ndim == 1 or name == "model.embed_tokens.weight"
            kind = GGMLQuantizationType.F32 if wide else GGMLQuantizationType.Q4_0
            file.write(quants.quantize(weight, kind).tobytes())


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer that makes one token of each of LETTERS, after one that begins every prompt."""
    others = (f"[{index}]" for index in range(len(LETTERS), vocab_size - 1))
    tokens = [token.encode() for token in chain(LETTERS, others, ["<s>"])]
    header = {
        1: len(tokens),
        2: max(map(len, tokens)),
        3: len(tokens) - 1,  # where a prompt begins; all tokens before it are ordinary ones
        9: 0,  # tokens that end a text
        10: 1,  # whether a prompt is to begin so
        0: 1,  # version
    }
    with path.open("wb") as file:
        _write_header(file, TOKENIZER_MAGIC, header)
        file.writelines(struct.pack("<fI", 0.0, len(token)) + token for token in tokens)


def prompt(num_tokens: int) -> str:
    """A text that such a tokenizer makes `num_tokens` of."""
    return "".join(LETTERS[index % len(LETTERS)] for index in range(num_tokens - 1))


def _write_header(file: BinaryIO, magic: int, header: Mapping[int, int]) -> None:
    pairs: Iterable[int] = chain.from_iterable(header.items())
    file.write(struct.pack(f"<{2 + 2 * len(header)}i", magic, 4 * (2 + 2 * len(header)), *pairs))
