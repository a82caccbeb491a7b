"""Transformers' continuous batching, a step at a time: requests of any length in one forward, over a paged cache.

Its manager would take requests, run steps and choose tokens in a thread of its own, with one draw for all requests, no
probabilities but the chosen token's, and nothing between steps. So only its batches serve here. They are alike on all
ranks, as they follow from which requests came and went, and from the tokens that were chosen.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.errors import InvalidInputError

_PAGE = 32  # tokens; equal beginnings of prompts are shared by whole pages
_NOBODY = torch.empty(0, 0)


def pages(model: nn.Module, *, num_tokens: int, max_requests: int, max_batch_tokens: int) -> "TransformersPages":
    """`Engine.pages`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=-(-num_tokens // _PAGE),
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=max_requests,
        use_async_batching=False,
        disable_nccl_graph_mixing=False,  # comes too late, and warns
    )
    own_attention = cast(Any, model).config._attn_implementation
    try:
        manager = cast(Any, model).init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)
        manager.distributed_helper.are_kv_heads_tp_ed = lambda: _shares_heads(model)
        return TransformersPages(model, manager._create_batch_processor(), own_attention)
    except (ValueError, AttributeError) as error:
        raise InvalidInputError(
            type(model).__name__,
            expected="a model that Transformers runs in continuous batches",
            found=f"one that it does not: {str(error).splitlines()[0]}",
            remedy="Continue prompts with narrowcast generate.",
        ) from error


def _shares_heads(model: nn.Module) -> bool:
    """True if a rank has keys and values of its own heads alone. Transformers takes those that it gathers for such."""
    styles = {name.rpartition(".")[2]: style for name, style in cast(Any, model).tp_plan.items()}
    return all(styles.get(name) == "colwise" for name in ("k_proj", "v_proj"))


class TransformersPages:
    """Requests in `batches`, Transformers' processor of them."""

    def __init__(self, model: nn.Module, batches: Any, own_attention: str) -> None:
        self._model, self._batches = cast(Any, model), batches
        self._own_attention, self._paged_attention = own_attention, self._model.config._attn_implementation
        self._logits_NV = _NOBODY
        self._ran = False  # a batch, whose tokens are to come
        self._past: Any = None  # of the text that is scored
        batches._update_tp_group_state = lambda: False  # ranks are told what to do by whoever calls
        batches.model_runner._sample = self._keep

    def add(self, name: str, prompt: Sequence[int]) -> None:
        from transformers.generation.continuous_batching.requests import RequestState

        state = RequestState(request_id=name, initial_tokens=list(prompt), max_new_tokens=None)
        self._batches.scheduler.add_waiting_request(state)

    def remove(self, name: str) -> None:
        self._batches.scheduler.set_request_cancellation(name)
        self._batches.scheduler.block_new_requests = (
            False  # of those that gave their room back; else only by its own end
        )

    def forward(self) -> tuple[Sequence[str], Tensor]:
        self._ran = self._batches.prepare_next_batch()
        if not self._ran:
            return [], _NOBODY
        self._batches._generation_step(self._model)
        batch = self._batches.inputs_and_outputs.requests_in_batch
        names = [each.state.request_id for each in batch if each.has_new_token]
        return names, self._logits_NV[: len(names)]  # it makes one row where nobody wants a token

    def take(self, tokens: Sequence[int]) -> None:
        if self._ran:
            outputs = self._batches.inputs_and_outputs
            outputs.output_ids[0, : len(tokens)] = torch.tensor(tokens)
            self._batches.update_batch()
            self._ran = False

    @torch.no_grad()
    def score(self, tokens: Sequence[int], *, begins: bool) -> Tensor:
        from transformers import DynamicCache

        if begins:
            self._past = DynamicCache(config=self._model.config)
        self._model.set_attn_implementation(self._own_attention)
        try:
            ids = torch.tensor([tokens], device=self._model.device)
            logits_1TV = self._model(ids, past_key_values=self._past, use_cache=True).logits
        finally:
            self._model.set_attn_implementation(self._paged_attention)
        return cast(Tensor, logits_1TV[0].float())

    def usage(self) -> float:
        cache = self._batches.cache
        kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in cache.cache_allocators.values())
        free = cache.compute_free_capacity(relative=False) + kept
        return float(1 - free / (cache.num_sectors * cache.bytes_per_sector))

    def _keep(self, scores_1NV: Tensor, _: Tensor) -> None:
        """In place of Transformers' choice of tokens."""
        self._logits_NV = scores_1NV[0]
