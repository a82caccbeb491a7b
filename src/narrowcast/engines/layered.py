"""Fields of configs, those included whose layers differ (Gemma 4)."""

from collections.abc import Mapping, Sequence
from typing import Any


def by_layer(config: Any, field: str) -> list[Any]:
    """The values of a field that is there: one, or one of each layer that has it where layers differ."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    values = [getattr(layer, field) for layer in layers if hasattr(layer, field)]
    return values if any(value != values[0] for value in values) else values[:1]


def in_words(numbers: Mapping[str, Sequence[Any]]) -> str:
    """Numbers by layer of things by name: "8 heads, 1 or 2 KV heads"."""
    kinds = {name: sorted({number for number in each if number}) for name, each in numbers.items()}
    return ", ".join(f"{' or '.join(map(str, each))} {name}" for name, each in kinds.items() if each)
