"""Decoding steps on the CPU: our attention of few queries in Transformers, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models import save_random
from narrowcast.codecs import kernels
from narrowcast.engines import transformers
from narrowcast.engines.transformers.decoding import NAME, choose, interface
from narrowcast.runtime import attention

compiled = pytest.mark.skipif(kernels.available() == [kernels.REFERENCE], reason="the compiled module is not installed")
pytestmark = compiled

FAMILIES = "llama", "llama-biased", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "mixtral", "qwen3-moe"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our kernel was given."""
    seen: list[tuple[int, ...]] = []
    run = attention.attend

    def noting(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(q.shape))
        return run(q, *args, **kwargs)

    monkeypatch.setattr("narrowcast.engines.transformers.decoding.interface.attend", noting)
    return seen


def random_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.load(save_random(name, folder, dtype))


def texts(num_sequences: int, length: int) -> Tensor:
    return torch.randint(2, 100, (num_sequences, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def step_by_step(model: Any, cache: Any, *, padding: int = 0) -> Tensor:
    """The logits of two texts, a prompt and then tokens one by one, two at once at the end."""
    ids = texts(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for start, stop in ((0, 20), *((at, at + 1) for at in range(20, 28)), (28, 30)):
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        found = model(**inputs, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True).logits
        logits.append(found[mask[:, start:stop].bool()])
    return torch.cat(logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_loaded_model_answers_as_with_sdpa(
    tmp_path: Path, calls: list[tuple[int, ...]], name: str, kind: str, padding: int
) -> None:
    """In FP32, where roundings do not add up to more than a thousandth of the largest logit."""
    model = random_model(name, tmp_path)
    assert model.config._attn_implementation == NAME

    def cache() -> Any:
        return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)

    ours = step_by_step(model, cache(), padding=padding)
    assert {shape[2] for shape in calls} == {1, 2}
    calls.clear()
    model.set_attn_implementation("sdpa")
    plain = step_by_step(model, cache(), padding=padding)
    assert not calls
    assert float((ours - plain).abs().max()) <= 1e-4 * float(plain.abs().max())


def test_a_prompt_runs_sdpa(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    model = random_model("llama", tmp_path)
    with torch.no_grad():
        ours = model(texts(2, attention.MOST_QUERIES + 1)).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(texts(2, attention.MOST_QUERIES + 1)).logits)
    assert not calls


def test_gradients_are_those_of_sdpa(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    model = random_model("llama", tmp_path)
    model(texts(1, 4), labels=texts(1, 4)).loss.backward()
    assert not calls
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("asked", ["eager", "flex_attention"])
def test_what_a_user_asked_for_stays(tmp_path: Path, asked: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_random("llama", tmp_path), attn_implementation=asked)
    choose(model)
    assert model.config._attn_implementation == asked


def test_a_config_does_not_keep_the_name(tmp_path: Path) -> None:
    """So that others can load what was saved."""
    random_model("llama", tmp_path / "a").save_pretrained(tmp_path / "b")
    assert NAME not in (tmp_path / "b" / "config.json").read_text()


def test_continuous_batching_runs_sdpa_and_gives_the_name_back(tmp_path: Path) -> None:
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    model = random_model("llama", tmp_path)
    asked = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=24)
    prompts = texts(2, 9).tolist()
    found = model.generate_batch(
        inputs=prompts, generation_config=asked, continuous_batching_config=config, progress_bar=False
    )
    assert model.config._attn_implementation == NAME
    alone = model.generate(torch.tensor(prompts), generation_config=asked)[:, 9:]
    assert [found[key].generated_tokens for key in sorted(found)] == alone.tolist()


def test_heads_that_are_too_odd_run_sdpa(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    model = random_model("llama-odd", tmp_path)
    model.generate(texts(1, 3), max_new_tokens=3)
    assert not calls


@pytest.mark.parametrize(
    "more", [{"s_aux": torch.zeros(2)}, {"dropout": 0.1}, {"position_bias": torch.zeros(1, 2, 1, 5)}]
)
def test_what_our_kernel_does_not_know_runs_sdpa(calls: list[tuple[int, ...]], more: dict[str, Any]) -> None:
    """Attention sinks, dropout, biases: the same arguments go on."""
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.random.fork_rng():
        found = interface.attention(module, q, k, v, None, **more)[0]
    assert torch.equal(found, attend(module, q, k, v, None, **more)[0])
    assert not calls
    interface.attention(module, q, k, v, None, s_aux=None)
    assert calls
