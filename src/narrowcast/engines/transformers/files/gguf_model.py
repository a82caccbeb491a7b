"""A GGUF file under the names of Transformers' parameters, with what llama.cpp has changed in them undone."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.engines.transformers.files.gguf_names import (
    ARCHITECTURES,
    FACTORS,
    FREQUENCIES,
    NO_PARAMETERS,
    Architecture,
)
from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.gguf import GgufFile
from narrowcast.weights.gguf.header import Header, read_header
from narrowcast.weights.parts import span
from narrowcast.weights.refusals import broken, unserved


def knows(path: Path) -> bool:
    """True if `GgufModel` can read the file; others Transformers may unpack.

    InvalidInputError for a broken file, and for what Transformers would leave out without a word.
    """
    header = read_header(path)
    if factors := [name for name in header.entries if name.startswith(FACTORS)]:
        raise unserved(path, "positions that one set of factors scales", factors[0], "Use a folder of safetensors.")
    _check_layers(header)
    return header.architecture in ARCHITECTURES and not _strangers(header)


def completed(config: Any, path: Path) -> Any:
    """The config of a GGUF file with what Transformers leaves out: biases, sizes of heads, scaled positions, experts.

    InvalidInputError for positions that are scaled in another way than by a factor.
    """
    if not knows(path):
        return config
    file = GgufModel(path)
    for field, module in (("attention_bias", "self_attn.q_proj"), ("mlp_bias", "mlp.up_proj")):
        if hasattr(config, field) and any(name.endswith(f"{module}.bias") for name in file.names):
            setattr(config, field, True)
    size = file.head_size
    if size is not None and getattr(config, "head_dim", None) not in (None, size):
        config.head_dim = size
    if (factor := file.position_factor) is not None:
        for parameters in _of_whole_contexts(config.rope_parameters):
            parameters |= {"rope_type": "linear", "factor": factor}
    return file.with_experts(config)


def _of_whole_contexts(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of positions in layers that see all of a context; Gemma 3 has others for those that do not."""
    by_kind = [each for kind, each in parameters.items() if kind == "full_attention"]
    return by_kind or [parameters]


class GgufModel:
    """A `Checkpoint` of a GGUF file.

    InvalidInputError for a broken file, and for a model that is not in the table of architectures.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        header = self._file.header
        self._architecture = _architecture(header)
        self._names = {str(self._architecture.parameter(name)): name for name in header.entries.keys() - NO_PARAMETERS}
        self._heads = _num_heads(header) if self._architecture.interleaved else {}

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    @property
    def notes(self) -> Sequence[str]:
        return self._file.notes

    @property
    def head_size(self) -> int | None:
        """Features of a head, where the file says so."""
        found = self._file.header.metadata.get(f"{self._file.header.architecture}.attention.key_length")
        return found if isinstance(found, int) else None

    def with_experts(self, config: Any) -> Any:
        """A config that has the experts of the file: of a Llama with such Mixtral's."""
        header = self._file.header
        prefix = f"{header.architecture}.expert"
        if f"{prefix}_count" not in header.metadata or not self._architecture.expert:
            return config
        number, used = header.number(f"{prefix}_count"), header.number(f"{prefix}_used_count")
        if used > number:
            raise broken(header.path, f"a token's experts among {number}", used)
        if header.architecture != "llama":
            config.moe_intermediate_size = header.number(f"{prefix}_feed_forward_length")
            return config
        from transformers import MixtralConfig

        known = {field.name for field in dataclasses.fields(MixtralConfig)} - {"model_type", "architectures"}
        fields = {name: value for name, value in config.to_dict().items() if name in known}
        return MixtralConfig(**fields, num_local_experts=number, num_experts_per_tok=used)

    @property
    def position_factor(self) -> float | None:
        """The factor that positions are to be divided by; None for none."""
        header = self._file.header
        prefix = f"{header.architecture}.rope.scaling"
        kind = header.metadata.get(f"{prefix}.type", "none")
        if kind == "none":
            return None
        factor = header.metadata.get(f"{prefix}.factor")
        if kind != "linear" or not isinstance(factor, float):
            raise unserved(
                header.path,
                "positions as they are, or scaled linearly",
                f"scaling {kind}",
                "Use a folder of safetensors.",
            )
        return factor

    @property
    def frequency_divisors(self) -> Tensor | None:
        """The numbers that rotary frequencies are to be divided by, FP32; None for none."""
        if FREQUENCIES not in self._file.header.entries:
            return None
        return self._file.values(FREQUENCIES).float()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(self._names[name])

    def format(self, name: str) -> WeightFormat | None:
        return self._file.format(self._names[name])

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        if (order := self._order(name, rows)) is None:
            return self._file.codes(self._names[name], rows, columns)
        heads, within = order
        return self._file.codes(self._names[name], heads, columns).rows(within)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        heads, within = self._order(name, rows) or (rows, ALL)
        found = self._file.values(self._names[name], heads, columns)[within]
        return found.float() - 1 if self._architecture.norms_plus_one and name.endswith("norm.weight") else found

    def _order(self, name: str, rows: slice) -> tuple[slice, Tensor] | None:
        """The rows of the file that whole heads take, and where `rows` are among them; None if rows are in order."""
        if (num_heads := self._heads.get(self._names[name].split(".")[-2])) is None:
            return None
        num_rows = self.shape(name)[0]
        size, odd = divmod(num_rows, num_heads)
        if odd or size % 2:
            raise broken(self._file.header.path, f"{num_heads} heads of even size", f"{num_rows} rows of {name}")
        start, stop = span(rows, num_rows)
        first = start // size * size
        row = torch.arange(start, stop)
        half, pair = (row % size) // (size // 2), (row % size) % (size // 2)
        return slice(first, -(-stop // size) * size), row // size * size + 2 * pair + half - first


def _architecture(header: Header) -> Architecture:
    found = ARCHITECTURES.get(header.architecture)
    strangers = _strangers(header)
    if found is None or strangers:
        raise unserved(
            header.path,
            f"a model of {', '.join(ARCHITECTURES)}",
            f"{header.architecture}" + (f" with {strangers[0]}" if found else ""),
            "Use a folder of safetensors.",
        )
    _check_layers(header)
    return found


def _check_layers(header: Header) -> None:
    """InvalidInputError for a file of other layers than it says; of unknown architectures, of more than tensors."""
    layers = {name.split(".")[1] for name in header.entries if name.startswith("blk.")}
    count = header.number(f"{header.architecture}.block_count", None if header.architecture in ARCHITECTURES else 1)
    if count != len(layers) and (header.architecture in ARCHITECTURES or count > len(header.entries)):
        raise broken(header.path, f"{count} layers, as it says", f"tensors of {len(layers)}")


def _strangers(header: Header) -> list[str]:
    """Tensors that are no parameters of the model."""
    architecture = ARCHITECTURES.get(header.architecture)
    return [
        name
        for name in header.entries
        if name not in NO_PARAMETERS and not (architecture and architecture.parameter(name))
    ]


def _num_heads(header: Header) -> dict[str, int]:
    queries = header.number(f"{header.architecture}.attention.head_count")
    return {"attn_q": queries, "attn_k": header.number(f"{header.architecture}.attention.head_count_kv", queries)}
