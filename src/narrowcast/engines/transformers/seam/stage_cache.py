"""Caches on a stage of a pipeline: asked for lengths, they tell those of the stage's own layers.

Transformers 5.23 asks the first layer of the whole model, or the last recurrent one. If that is on another stage, the
answer is 0 tokens: with a static cache, behind padding, and for several tokens behind any cache, positions and masks
would be wrong, without an error.
"""

import functools
from typing import Any, cast


def tell_own_lengths_(cache: Any, layers: range) -> None:
    """Let a cache answer for these layers, of which alone it will be filled; its copies do so too."""
    from transformers.cache_utils import Cache

    if isinstance(cache, Cache) and not hasattr(cache, "own_layers"):
        cache.__class__, cache.own_layers = _of_stage(cast(Any, type(cache))), layers


@functools.cache
def _of_stage(kind: Any) -> Any:
    """The class of caches of class `kind` on a stage."""

    class CacheOfStage(kind):  # type: ignore[misc]
        own_layers: range

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return super().get_seq_length(self._with_keys(layer_idx))

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
            return super().get_mask_sizes(query_length, self._with_keys(layer_idx))

        def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
            own = self._own("has_previous_state")
            found: bool = super().has_previous_state(own[-1] if own and layer_idx is None else layer_idx, state_idx)
            return found

        def _with_keys(self, asked: int) -> int:
            """A layer of this stage: the one asked, else one with keys of its kind, else any with keys."""
            own = self._own("get_mask_sizes")
            if asked in own or not own:
                return asked
            kind = type(self.layers[asked]) if asked < len(self.layers) else None
            return next((index for index in own if type(self.layers[index]) is kind), own[0])

        def _own(self, attribute: str) -> list[int]:
            made = (index for index in self.own_layers if index < len(self.layers))
            return [index for index in made if hasattr(self.layers[index], attribute)]

    return CacheOfStage
