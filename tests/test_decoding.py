"""Decoding steps on the CPU: our attention of few queries in Transformers, and what it leaves alone."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from models import save_random
from narrowcast.codecs import kernels
from narrowcast.engines import transformers
from narrowcast.engines.transformers.decoding import (
    GATE_UP,
    NAME,
    QKV,
    choose,
    families,
    growing,
    interface,
    layers,
    shorten_steps,
)
from narrowcast.runtime import attention

compiled = pytest.mark.skipif(kernels.available() == [kernels.REFERENCE], reason="the compiled module is not installed")
pytestmark = compiled

FAMILIES = "llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "qwen3-moe"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our kernel was given."""
    seen: list[tuple[int, ...]] = []
    run = attention.attend

    def noting(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(q.shape))
        return run(q, *args, **kwargs)

    for user in ("interface", "layers", "paging"):
        monkeypatch.setattr(f"narrowcast.engines.transformers.decoding.{user}.attend", noting)
    return seen


def random_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.load(save_random(name, folder, dtype))


@pytest.fixture(autouse=True, scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loading tries forwards for steps on a small model, once for a config: not while calls are counted."""
    for name in (*FAMILIES, "llama-odd"):
        random_model(name, tmp_path_factory.mktemp(name))


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
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")  # the default of each
    plain = step_by_step(model, cache(), padding=padding)
    assert not calls
    assert float((ours - plain).abs().max()) <= 1e-4 * float(plain.abs().max())


@pytest.mark.parametrize("name, default", [("llama", "sdpa"), ("gemma2", "eager")])
def test_a_prompt_runs_as_it_would(tmp_path: Path, calls: list[tuple[int, ...]], name: str, default: str) -> None:
    model = random_model(name, tmp_path)
    with torch.no_grad():
        ours = model(texts(2, attention.MOST_QUERIES + 1)).logits
        model.set_attn_implementation(default)
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


# --- Forwards for steps ----------------------------------------------------------------------------------------------

SHORTENED = "llama", "llama-biased", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"
as_pytorch_adds = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def both_ways(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model with forwards for steps, and one that has our attention alone."""
    short, plain = random_model(name, folder, dtype), random_model(name, folder, dtype)
    for module in plain.modules():
        vars(module).pop("forward", None)
    assert "forward" in vars(short.model.layers[0].self_attn)
    return short, plain


def caches(model: Any) -> dict[str, Any]:
    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=40)}


@pytest.mark.parametrize("name", SHORTENED)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_the_classes(tmp_path: Path, name: str, kind: str, padding: int, dtype: torch.dtype) -> None:
    """Bit for bit, where PyTorch adds up norms over eight lanes; elsewhere norms may be rounded otherwise."""
    short, plain = both_ways(tmp_path, name, dtype)
    found = step_by_step(short, caches(short)[kind], padding=padding)
    expected = step_by_step(plain, caches(plain)[kind], padding=padding)
    if as_pytorch_adds:
        assert torch.equal(found, expected)
    unit = torch.finfo(dtype).eps
    assert float((found - expected).abs().max()) <= 16 * unit * float(expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generating_is_the_same(tmp_path: Path, name: str) -> None:
    """Sampling three continuations of two texts, and beams, which reorder the cache."""
    short, plain = both_ways(tmp_path, name, torch.float32)
    for options in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3, "do_sample": False}):
        texts_of = []
        for model in (short, plain):
            torch.manual_seed(0)
            texts_of.append(model.generate(texts(2, 9), max_new_tokens=20, **options))
        assert torch.equal(*texts_of)


def test_hooks_see_every_module(tmp_path: Path) -> None:
    model = random_model("llama", tmp_path)
    seen = []
    for name, module in model.model.layers[0].named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(texts(1, 2), past_key_values=DynamicCache())
    assert {"self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm"} <= {*seen}
    with torch.no_grad():
        states = model(texts(1, 2), past_key_values=DynamicCache(), output_hidden_states=True).hidden_states
    assert len(states) == 3


def test_a_copy_computes_with_its_own_weights(tmp_path: Path) -> None:
    model = random_model("llama", tmp_path)
    twin = copy.deepcopy(model)
    for weight in twin.parameters():
        weight.data.zero_()
    assert step_by_step(model, DynamicCache()).abs().max() > 0
    assert step_by_step(twin, DynamicCache()).abs().max() == 0


def test_forwards_are_given_back(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_random("llama", tmp_path))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    forwards = shorten_steps(model)
    assert any("forward" in vars(module) for module in model.modules())
    forwards.restore()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_class_that_computes_otherwise_keeps_its_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another release might: here norms double."""
    plain = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: 2 * plain(self, x))
    families._is_same.cache_clear()
    try:
        model = random_model("llama", tmp_path)
    finally:
        families._is_same.cache_clear()
    assert not any("forward" in vars(module) for module in model.modules())
    assert "decoding steps of LlamaForCausalLM are Transformers' own" in caplog.text


def test_layers_with_one_input_can_be_asked_at_once(tmp_path: Path) -> None:
    short, plain = both_ways(tmp_path, "llama", torch.float32)
    asked = []
    for layer in short.model.layers:
        attention_, mlp = layer.self_attn, layer.mlp

        def fused(x: Tensor, layers: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
            asked.append(len(layers))
            return None if x.shape[1] > 1 else tuple(each(x) for each in layers)

        parts = {attention_: ("q_proj", "k_proj", "v_proj"), mlp: ("gate_proj", "up_proj")}
        for module, name in ((attention_, QKV), (mlp, GATE_UP)):
            several = tuple(getattr(module, part) for part in parts[module])
            vars(module)[name] = functools.partial(fused, layers=several)
    assert torch.equal(step_by_step(short, DynamicCache()), step_by_step(plain, DynamicCache()))
    assert {*asked} == {2, 3}


# --- Caches ----------------------------------------------------------------------------------------------------------


def filled(kind: type, *options: int) -> Any:
    layer = kind(*options)
    layer.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    return layer


def append(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    assert growing.length(layer, x.shape[2]) is not None
    keys, values = growing.grow(layer, x.shape[2])
    keys[:, :, -x.shape[2] :], values[:, :, -x.shape[2] :] = x, -x
    return keys, values


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_a_cache_grows_as_it_would(kind: type) -> None:
    options = (7,) if kind is DynamicSlidingWindowLayer else ()
    ours = filled(kind, *options)
    twin = copy.deepcopy(ours)
    for num_tokens in (1, 1, 1, 3, 1, 200, 1, 1):
        x = torch.randn(1, 2, num_tokens, 8)
        for have, want in zip(append(ours, x), twin.update(x, -x), strict=True):
            assert torch.equal(have, want)
        assert torch.equal(ours.keys, twin.keys)
        assert ours.get_seq_length() == twin.get_seq_length()
        assert ours.get_mask_sizes(2) == twin.get_mask_sizes(2)


def test_a_growing_cache_stays_where_it_is() -> None:
    layer = filled(DynamicLayer)
    append(layer, torch.randn(1, 2, 1, 8))
    place = layer.keys.data_ptr()
    for _ in range(50):
        append(layer, torch.randn(1, 2, 1, 8))
    assert layer.keys.data_ptr() == place


@pytest.mark.parametrize("branch", [copy.copy, copy.deepcopy])
def test_branches_of_a_cache_do_not_write_into_each_other(branch: Any) -> None:
    layer = filled(DynamicLayer)
    append(layer, torch.randn(1, 2, 1, 8))
    other = branch(layer)
    one, two = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    append(layer, one)
    append(other, two)
    assert torch.equal(layer.keys[:, :, -1:], one)
    assert torch.equal(other.keys[:, :, -1:], two)
    assert torch.equal(layer.keys[:, :, :-1], other.keys[:, :, :-1])


def test_what_was_cropped_is_not_overwritten_under_who_still_has_it() -> None:
    layer = filled(DynamicLayer)
    before = append(layer, torch.randn(1, 2, 1, 8))[0]
    kept = before.clone()
    layer.crop(-1)
    append(layer, torch.randn(1, 2, 1, 8))
    assert torch.equal(before, kept)


def test_a_full_static_cache_is_left_to_the_engine() -> None:
    layer = filled(StaticLayer, 6)
    append(layer, torch.randn(1, 2, 1, 8))
    assert growing.length(layer, 1) is None


# --- Norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [modeling_llama.LlamaRMSNorm, modeling_gemma3.Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_norms_are_those_of_the_classes(kind: Any, dtype: torch.dtype) -> None:
    """On every path; widths around those of vectors (8 and more), and where sums have more levels."""
    for size, num_tokens in ((8, 3), (15, 1), (33, 2), (511, 3), (2048, 200), (17000, 1)):
        norm = kind(size).to(dtype)
        norm.weight.normal_(1, 0.1)
        ours = layers.norm_from_one_forward if hasattr(norm, "eps") else layers.norm_forward
        x = 3 * torch.randn(1, num_tokens, size).to(dtype)
        expected = norm(x)
        for path in kernels.available()[1:]:
            with kernels.forced(path):
                found = ours(norm, x)
            if as_pytorch_adds:
                assert torch.equal(found, expected), (size, path)
            torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
