"""Continuous batching on the CPU: each sequence attends to its own keys, in the pages of one cache."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from models import save_random
from narrowcast.codecs import kernels
from narrowcast.engines import transformers
from narrowcast.engines.transformers.decoding import NAME, paging
from narrowcast.runtime import attention

pytestmark = pytest.mark.skipif(kernels.available() == [kernels.REFERENCE], reason="no compiled module")

# Full attention, windows of 6 keys in all layers or every other one, capped scores, experts, heads that do not fit.
FAMILIES = "llama", "mistral", "qwen3", "gemma2", "mixtral", "llama-odd"
ASKED = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our kernel attended with to keys in pages."""
    seen: list[tuple[int, ...]] = []

    def noting(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(q.shape))
        return attention.attend(q, *args, **kwargs)

    monkeypatch.setattr(paging, "attend", noting)
    return seen


def random_model(name: str, folder: Path) -> Any:
    return transformers.load(save_random(name, folder, torch.float32))


def prompts() -> list[list[int]]:
    """Of one token, of few and many; the last one begins as another does."""
    random = torch.Generator().manual_seed(3)
    found = [torch.randint(2, 100, (length,), generator=random).tolist() for length in (1, 17, 9, 40, 12)]
    return [*found, found[3][:35] + found[2]]


def continued(model: Any, **options: Any) -> list[Any]:
    config = ContinuousBatchingConfig(num_blocks=48, page_size=8, **options)
    found = model.generate_batch(inputs=prompts(), generation_config=ASKED, continuous_batching_config=config)
    return list(found.values())


def tokens_of(found: list[Any]) -> list[list[int]]:
    return [each.generated_tokens for each in found]


def each_alone(model: Any) -> list[list[int]]:
    return [model.generate(torch.tensor([ids]), generation_config=ASKED)[0, len(ids) :].tolist() for ids in prompts()]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("most", [24, 256])
def test_texts_go_on_as_each_alone(tmp_path: Path, calls: list[tuple[int, ...]], name: str, most: int) -> None:
    """With `most` of 24 tokens in a batch prompts come in pieces, beside tokens of others."""
    model = random_model(name, tmp_path)
    found = continued(model, max_batch_tokens=most)
    assert tokens_of(found) == each_alone(model)
    assert model.config._attn_implementation == NAME
    queries = {(num_sequences, num_queries) for num_sequences, _, num_queries, _ in calls}
    if name == "llama-odd":
        assert not queries
    else:
        assert (6, 1) in queries  # those of all in one call
        assert {num_queries for _, num_queries in queries} > {1, 12}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_probabilities_are_those_of_sdpa(tmp_path: Path, calls: list[tuple[int, ...]], name: str) -> None:
    """In FP32, where roundings do not add up to more than a thousandth of the largest logit."""
    model = random_model(name, tmp_path)
    ours = torch.tensor([each.logprobs for each in continued(model, max_batch_tokens=24, return_logprobs=True)])
    calls.clear()
    model.set_attn_implementation("sdpa")
    plain = torch.tensor([each.logprobs for each in continued(model, max_batch_tokens=24, return_logprobs=True)])
    assert not calls
    assert float((ours - plain).abs().max()) <= 1e-4 * float(plain.abs().max())


def test_scores_are_capped(tmp_path: Path) -> None:
    """Which Transformers' own paged attention leaves out: most texts of this model go on otherwise there."""
    model = random_model("gemma2", tmp_path)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.3
        layer.self_attn.q_proj.weight.data *= 30
    assert tokens_of(continued(model, max_batch_tokens=24)) == each_alone(model)


def test_no_masks_are_made_for_all_keys(tmp_path: Path) -> None:
    """Theirs takes [tokens of a batch, all keys of the cache and these]."""
    model, config = random_model("llama", tmp_path), ContinuousBatchingConfig(num_blocks=8, page_size=8)
    manager = model.init_continuous_batching(ASKED, config)
    manager.warmup()
    assert manager.batch_processor.inputs_and_outputs.attention_mask is None
    manager.destroy()
    assert model.config._attn_implementation == NAME


def test_padding_stays_zero() -> None:
    """Compiled graphs have tokens and sequences behind those that there are."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 8, 24, generator=random) for _ in range(3))
    allocator = SimpleNamespace(index=0, layer_type="full_attention", update=lambda k, v, *_: (k, v))
    ends = torch.tensor([0, 4, 5, 5, 5], dtype=torch.int32)
    found = paging.attention(
        allocator, 0, q, k, v, pytest.fail, 0.2, 0.0,
        cu_seq_lens_q=ends, cu_seq_lens_k={"full_attention": ends}, max_length_q=8,
        read_index=[ends[:0].long()], write_index=[torch.arange(8)],
    )  # fmt: skip
    for begin, end in (0, 4), (4, 5):
        alone = (x[:, :, begin:end] for x in (q, k, v))
        assert torch.equal(found[:, begin:end], attention.attend(*alone, scale=0.2, causal=True))
    assert found[:, 5:].eq(0).all()
