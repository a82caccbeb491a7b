"""The base of codecs without calibrated tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

from torch import Tensor

from narrowcast.codecs.base import Codec
from narrowcast.codecs.recipes import Ranges
from narrowcast.codecs.spelling import Spelt


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicCodec(Spelt, Codec):
    """A codec that finds all it needs in each token: any rank's values may be coded, and it is its own recipe."""

    @property
    def num_sources(self) -> None:
        return None

    def codec(self, ranges: Ranges) -> Self:
        """Itself: nothing is calibrated."""
        return self

    def _features(self, start: int, stop: int) -> Self:
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}, {}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        kinds = get_type_hints(cls)
        for name, value in config.items():
            if kinds[name] in (bool, int) and type(value) is not kinds[name]:
                raise TypeError(f"{name} is {kinds[name].__name__}, not {value!r}")
        return cls(**config)
