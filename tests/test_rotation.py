"""Rotated models: the same answers on other axes, and refused where they would not be."""

import copy
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import narrowcast
from conftest import MODEL
from models import CONFIGS, SMALL, random_ids
from narrowcast.calibration.moments import Moments
from narrowcast.cli.rotate import rotate as rotate_command
from narrowcast.errors import InvalidInputError, PlanMismatchError
from narrowcast.rotation import axes
from narrowcast.rotation.rotate import rotate
from narrowcast.scores import Score, compare, log_probs
from test_cli import narrowcast as command
from test_cli import refused

SCALED: dict[str, Any] = {  # (1 + weight) as gain, factors on embedding, sums and logits
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=24),
    "granite": lambda: transformers.GraniteConfig(
        **SMALL, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
}
ALL = CONFIGS | SCALED
NORMS_AFTER = ["gemma2", "olmo2"]
EXACT = [name for name in ALL if name not in NORMS_AFTER]


def random_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Weights as initialized, and random gains and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    return model


def random_rotation(num_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)).Q


def outputs(model: Any, ids: Tensor, *names: str) -> list[Tensor]:
    """Logits, and what the named modules return."""
    seen: list[Tensor] = []
    hooks = [model.get_submodule(name).register_forward_hook(lambda _, args, y: seen.append(y)) for name in names]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return [logits, *seen]


def fp32_error(config: Any) -> float:
    """Relative: the 7 matrix products of a layer and the last one each round sums of at most n products.

    Roundings of 2^-24 add up like the square root of n if their signs are random, and over products one by one.
    """
    longest = max(config.hidden_size, config.intermediate_size, 96)
    return float(2**-24 * math.sqrt(longest) * (7 * config.num_hidden_layers + 1))


@pytest.mark.parametrize("name", EXACT)
def test_answers_stay_and_sums_are_rotated(name: str) -> None:
    config, ids = ALL[name](), random_ids(2, 24)
    model = random_model(config)
    last = config.num_hidden_layers - 1
    sums = ["model.layers.0.self_attn.o_proj", f"model.layers.{last}.mlp"]
    rotation_EE = random_rotation(config.hidden_size)
    expected, *partials = outputs(model, ids, *sums)
    rotate(model, rotation_EE)
    found, *rotated = outputs(model, ids, *sums)
    tolerance = fp32_error(config)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for before, after in zip(partials, rotated, strict=True):
        turned = before @ rotation_EE.float()
        assert (after - turned).norm() <= tolerance * turned.norm()
        assert (after - before).norm() > 0.5 * before.norm()


def score(expected: Tensor, found: Tensor, ids: Tensor) -> Score:
    return compare([expected], [found], [ids])


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_in_bf16_it_is_one_more_rounding(name: str) -> None:
    """No farther from the model in FP32 than twice what BF16 costs anyway (KL goes with errors squared: four times)."""
    config, ids = ALL[name](), random_ids(4, 24)
    model = random_model(config, torch.bfloat16)
    exact = log_probs(copy.deepcopy(model).float(), ids)
    floor = score(exact, log_probs(model, ids), ids).kl_nats
    rotate(model, random_rotation(config.hidden_size))
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert score(exact, log_probs(model, ids), ids).kl_nats < 4 * floor


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_what_was_saved(tied: bool, tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied))
    ids = random_ids(2, 12)
    (expected,) = outputs(model, ids)
    rotate(model, random_rotation(96))
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(outputs(loaded, ids)[0], outputs(model, ids)[0])
    torch.testing.assert_close(outputs(loaded, ids)[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(loaded.model.norm.weight, torch.ones(96))


def test_back_again() -> None:
    """Rotated by Q and by its transpose, the weights are those with which gains alone were folded."""
    twice, folded = (random_model(CONFIGS["llama-biased"]()) for _ in range(2))
    rotation_EE = random_rotation(96)
    rotate(twice, rotation_EE)
    rotate(twice, rotation_EE.T)
    rotate(folded, torch.eye(96))
    for (name, found), expected in zip(twice.named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


# What cannot be rotated


def unchanged_and_refused(model: Any, match: str, rotation_EE: Tensor | None = None) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    with pytest.raises(InvalidInputError, match=match):
        rotate(model, random_rotation(96) if rotation_EE is None else rotation_EE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.tie_word_embeddings == tied
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", NORMS_AFTER)
def test_norms_after_a_sublayer_are_refused(name: str) -> None:
    unchanged_and_refused(random_model(CONFIGS[name]()), "post_attention_layernorm, whose output no layer reads")


def test_norms_that_subtract_the_mean_are_refused() -> None:
    unchanged_and_refused(random_model(transformers.Starcoder2Config(**SMALL)), "an RMS norm.*found LayerNorm")
    unchanged_and_refused(random_model(transformers.CohereConfig(**SMALL)), "an RMS norm.*found CohereLayerNorm")


def test_other_architectures_are_refused() -> None:
    gpt2 = transformers.GPT2Config(vocab_size=101, n_embd=96, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=None)
    unchanged_and_refused(random_model(gpt2), "decoder layers in a list named layers")
    minimax = transformers.MiniMaxConfig(**SMALL, head_dim=24)  # norms its residual stream
    unchanged_and_refused(random_model(minimax), "layers that commute with rotations.*layers.0")


def test_a_layer_that_does_what_nobody_knows_is_tried_and_refused() -> None:
    """It looks like a Llama's, and clips the stream."""
    model = random_model(CONFIGS["llama"]())

    class Clipping(type(model.model.layers[1])):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x.clamp(-0.5, 0.5), *args, **kwargs)

    model.model.layers[1].__class__ = Clipping
    unchanged_and_refused(model, r"layers that commute.*model.layers.1, whose answer is off by")


def test_an_embedding_that_is_changed_on_the_way_is_refused() -> None:
    model = random_model(CONFIGS["llama"]())
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0].abs(), *args[1:]))
    with pytest.raises(InvalidInputError, match="the embedding as the first layer's input"):
        rotate(model, random_rotation(96))


def test_quantized_weights_are_refused() -> None:
    class Quantized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round())

    model = random_model(CONFIGS["llama"]())
    model.model.layers[0].mlp.up_proj.__class__ = Quantized
    unchanged_and_refused(model, r"plain floating-point weights.*up_proj \(Quantized\)")


def test_split_models_and_those_with_a_plan_are_refused() -> None:
    model = random_model(CONFIGS["llama"]())
    plan = narrowcast.calibrate(model, [random_ids(1, 8)], tp_size=2)
    with narrowcast.attach(model, plan, simulate=True):
        unchanged_and_refused(model, "a model without a plan")
    model._pp_stage = SimpleNamespace(pp_size=2)
    unchanged_and_refused(model, "a whole model, found one split by")


@pytest.mark.parametrize(
    ("rotation_EE", "match"),
    [
        (torch.ones(96, 96), "an orthogonal matrix"),
        (torch.eye(96)[:, :95], "an orthogonal matrix"),
        (torch.ones(96), "an orthogonal matrix"),
        (torch.eye(64), "the model's 96 features, found 64"),
    ],
)
def test_other_matrices_are_refused(rotation_EE: Tensor, match: str) -> None:
    unchanged_and_refused(random_model(CONFIGS["llama"]()), match, rotation_EE)


def test_plans_are_for_the_axes_that_they_were_made_on() -> None:
    model, ids = random_model(CONFIGS["llama"]()), random_ids(1, 8)
    before = narrowcast.calibrate(model, [ids], tp_size=2)
    rotated = copy.deepcopy(model)
    rotate(rotated, random_rotation(96))
    after = narrowcast.calibrate(rotated, [ids], tp_size=2)
    narrowcast.attach(rotated, after, simulate=True).remove()
    for other, plan in ((rotated, before), (model, after)):
        with pytest.raises(PlanMismatchError):
            narrowcast.attach(other, plan, simulate=True)


# Axes


@pytest.mark.parametrize("num_features", [1, 2, 7, 76, 96, 256])
def test_hadamard_axes_spread_each_feature_over_all(num_features: int) -> None:
    rotation_EE = axes.hadamard(num_features)
    torch.testing.assert_close(rotation_EE @ rotation_EE.T, torch.eye(num_features, dtype=torch.float64))
    odd = num_features // (num_features & -num_features)
    assert rotation_EE.abs().max() <= math.sqrt((2 if odd > 1 else 1) / num_features) + 1e-12


def wishart(num_features: int, seed: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(num_samples, num_features, generator=generator)
    samples = samples @ torch.randn(num_features, num_features, generator=generator)
    return samples.T @ samples / num_samples


def moments(num_features: int, num_sites: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    covariances = {f"site{site}": wishart(num_features, site, 64) for site in range(num_sites)}
    return covariances, {name: wishart(num_features, 10 + site, 64) for site, name in enumerate(covariances)}


def off_diagonal(matrix: Tensor) -> float:
    return float((matrix - matrix.diagonal().diag()).norm() / matrix.norm())


def test_principal_axes_decorrelate_the_pooled_sums() -> None:
    covariances, _ = moments(12)
    rotation_EE = axes.principal(covariances)
    pooled = sum(each.double() / each.double().trace() for each in covariances.values())
    assert off_diagonal(rotation_EE.T @ pooled @ rotation_EE) < 1e-12
    loud = {**covariances, "site0": 1e6 * covariances["site0"]}  # a site counts as much however loud it is
    torch.testing.assert_close(axes.principal(loud), rotation_EE, rtol=0, atol=1e-5)


def test_fisher_pooled_axes_are_those_of_the_site_that_matters() -> None:
    covariances, fishers = moments(12)
    fishers["site1"] = 1e9 * fishers["site1"]
    rotation_EE = axes.fisher_pooled(covariances, fishers)
    assert off_diagonal(rotation_EE.T @ covariances["site1"].double() @ rotation_EE) < 1e-6


def test_joint_axes_find_the_ones_that_all_matrices_share() -> None:
    shared = random_rotation(24)
    generator = torch.Generator().manual_seed(0)

    def on_shared_axes() -> Tensor:
        return (shared * torch.exp(torch.randn(24, generator=generator, dtype=torch.float64))) @ shared.T

    covariances = {f"site{site}": on_shared_axes() for site in range(4)}
    fishers = {name: on_shared_axes() for name in covariances}
    rotation_EE = axes.joint(covariances, fishers)
    for matrix in (*covariances.values(), *fishers.values()):
        assert off_diagonal(rotation_EE.T @ matrix @ rotation_EE) < 0.01
    best = axes.objective(shared, covariances, fishers)
    assert axes.objective(rotation_EE, covariances, fishers) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("num_sites", [1, 2, 5])
def test_in_the_plane_joint_axes_are_at_the_best_of_all_angles(num_sites: int) -> None:
    """Here, that is: in general they are at a local minimum."""
    covariances, fishers = moments(2, num_sites)
    angles = torch.linspace(0, math.pi / 2, 2001, dtype=torch.float64)
    turned = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]], dtype=torch.float64) for a in angles]
    best = min(axes.objective(each, covariances, fishers) for each in turned)
    found = axes.objective(axes.joint(covariances, fishers), covariances, fishers)
    assert best - 1e-3 < found < best + 1e-4


def test_joint_axes_are_better_than_any_others_here() -> None:
    """Bits by what axes are worth: their high-rate loss. The matrix is orthogonal to FP64."""
    covariances, fishers = moments(32)
    values = {
        "joint": axes.joint(covariances, fishers),
        "principal": axes.principal(covariances),
        "fisher": axes.fisher_pooled(covariances, fishers),
        "hadamard": axes.hadamard(32),
        "as they are": torch.eye(32, dtype=torch.float64),
    }
    for rotation_EE in values.values():
        torch.testing.assert_close(rotation_EE.T @ rotation_EE, torch.eye(32, dtype=torch.float64))
    losses = {name: axes.objective(rotation_EE, covariances, fishers) for name, rotation_EE in values.items()}
    assert losses["joint"] < min(loss for name, loss in losses.items() if name != "joint") - 0.05


# The command


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rotated") / "model"
    told, verdict = command("rotate", MODEL, out).stdout.splitlines()
    assert told == f"{out}: {MODEL} on hadamard axes"
    assert re.fullmatch(r"verdict: none noticed; KL 0\.000\d+ nats from the uncompressed model, on 129 tokens", verdict)
    return out


def test_rotate_writes_a_model_that_answers_alike(rotated: Path) -> None:
    """Of a trained model in BF16: within what BF16 itself costs it, see docs/rotation.md."""
    assert_answers_alike(rotated)


def assert_answers_alike(rotated: Path) -> None:
    whole, other = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (MODEL, rotated))
    text = (MODEL / "scoring.txt").read_text(encoding="utf8")
    tokenizer = AutoTokenizer.from_pretrained(rotated)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    found = score(log_probs(whole, ids), log_probs(other, ids), ids)
    assert other.dtype == torch.bfloat16
    assert found.kl_nats < 0.001 and found.top1_agreement > 0.95


def test_rotate_takes_along_what_else_the_folder_holds(rotated: Path) -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert {path.name for path in rotated.iterdir()} == names | {"rotation.json"}
    assert [path.name for path in rotated.parent.iterdir()] == [rotated.name]  # nothing half-written beside it
    assert {path.stat().st_mode & 0o777 for path in rotated.iterdir()} == {
        (rotated / "config.json").stat().st_mode & 0o777
    }
    assert (rotated / "calibration.txt").read_bytes() == (MODEL / "calibration.txt").read_bytes()
    mark = json.loads((rotated / "rotation.json").read_text(encoding="utf8"))
    assert (mark["axes"], mark["source"]) == ("hadamard", str(MODEL))


def test_rotate_replaces_nothing_unless_told(rotated: Path, tmp_path: Path) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "rotation.json").write_text("{}", encoding="utf8")
    assert "found one that exists" in refused("rotate", MODEL, rotated)
    assert "something that rotate has not written" in refused("rotate", MODEL, foreign, "--overwrite")
    assert "a folder apart from MODEL" in refused("rotate", rotated, rotated / "again")
    assert "a folder apart from MODEL" in refused("rotate", rotated, rotated, "--overwrite")
    assert "a folder that exists" in refused("rotate", MODEL, tmp_path / "no" / "out")
    command("rotate", MODEL, out)
    (out / "config.json").unlink()
    command("rotate", MODEL, out, "--overwrite")
    assert (out / "config.json").is_file()


def test_a_model_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    random_model(CONFIGS["gemma2"]()).save_pretrained(tmp_path / "gemma2")
    assert "post_attention_layernorm" in refused("rotate", tmp_path / "gemma2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gemma2"]


@pytest.mark.parametrize("chosen", ["principal", "fisher", "joint"])
def test_axes_are_those_of_the_moments(chosen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With moments of no model: the embedding that is written is the original's, on these axes."""
    partial, total, fisher = (
        {name: wishart(256, seed, 512).float() for seed, name in enumerate("ab", 2 * place)} for place in range(3)
    )
    seen = {site: Moments(partial=partial[site][None], total=total[site][None], fisher=fisher[site]) for site in "ab"}
    covariances = {site: each.partial[0] + each.total[0] for site, each in seen.items()}
    fishers = {site: each.fisher for site, each in seen.items()}
    asked: dict[str, Any] = {}

    def observe(model: Any, batches: list[Tensor], *, tp_size: int, moments: str) -> SimpleNamespace:
        asked.update(shapes=[list(each.shape) for each in batches], tp_size=tp_size, moments=moments)
        return SimpleNamespace(moments=seen)

    monkeypatch.setattr(sys.modules["narrowcast.rotation.search"], "observe", observe)
    rotate_command(
        str(MODEL), tmp_path / "out", chosen, MODEL / "scoring.txt", tp=4, num_samples=2, max_seq_len=16, device="cpu"
    )
    assert asked == {"shapes": [[1, 16]] * 2, "tp_size": 4, "moments": "full"}
    rotation_EE = {
        "principal": lambda: axes.principal(covariances),
        "fisher": lambda: axes.fisher_pooled(covariances, fishers),
        "joint": lambda: axes.joint(covariances, fishers),
    }[chosen]()
    before, after = (load_file(path / "model.safetensors") for path in (MODEL, tmp_path / "out"))
    expected = before["model.embed_tokens.weight"].float() @ rotation_EE.float()
    torch.testing.assert_close(after["model.embed_tokens.weight"], expected.bfloat16())
    mark = json.loads((tmp_path / "out" / "rotation.json").read_text(encoding="utf8"))
    assert (mark["axes"], mark["text"], mark["tp_size"]) == (chosen, str(MODEL / "scoring.txt"), 4)


def test_measured_axes_serve_the_model(tmp_path: Path) -> None:
    """From the model's own sums to a folder that answers alike."""
    text = "--text", MODEL / "scoring.txt", "--num-samples", 2, "--max-seq-len", 16
    command("rotate", MODEL, tmp_path / "out", "--axes", "joint", *text)
    assert_answers_alike(tmp_path / "out")


def test_axes_that_are_measured_need_a_text(tmp_path: Path) -> None:
    assert "text to measure joint axes on" in refused("rotate", MODEL, tmp_path / "out", "--axes", "joint")
    assert "Leave it out" in refused("rotate", MODEL, tmp_path / "out", "--text", MODEL / "scoring.txt")
