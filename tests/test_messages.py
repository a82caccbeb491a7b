"""What is wrong with a model, said in one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import narrowcast.__main__
from commands import typed
from conftest import MODEL
from models import random_ids, save_random
from narrowcast import calibrate, cli
from narrowcast.__main__ import TRACEBACK
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import evaluate

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model, to break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS):
        shutil.copy(MODEL / name, copy)
    return copy


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return apply


DOWN = "model.layers.3.mlp.down_proj.weight"
BROKEN = {
    "no config": (without("config.json"), "found a folder without config.json"),
    "a config that is none": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json: expected JSON, .*Copy or download it again",
    ),
    "no weights": (without(WEIGHTS), "no file named model.safetensors"),
    "half the weights": (truncated, "expected a safetensors file, .*Copy or download it again"),
    "no weights of a layer": (changed(lambda weights: weights.pop(DOWN)), f"found none for {DOWN}"),
    "a layer of another size": (
        changed(lambda weights: weights.update({DOWN: weights[DOWN][:, :8].clone()})),
        rf"expected {DOWN} of shape \(256, 704\), as its config says, found \(256, 8\)",
    ),
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_a_broken_folder(wrong: str, folder: Path) -> None:
    break_it, sentence = BROKEN[wrong]
    break_it(folder)
    with pytest.raises(InvalidInputError, match=sentence) as refused:
        load_engine().load(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InvalidInputError, match=r"expected a tokenizer beside the weights, .* found none"):
        load_engine().load_tokenizer(folder)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("./nowhere", "no such folder"),
        ("/no/where/at/all", "no such folder"),
        ("no where", "no such folder"),
        ("nowhere.gguf", "no such file"),
        (str(MODEL / "config.json"), "a file that is not GGUF's"),
        ("organization/nowhere", "hub"),  # offline, as the tests run
    ],
)
def test_a_wrong_path(path: str, found: str) -> None:
    engine = load_engine()
    for read in (engine.load, engine.skeleton, engine.load_tokenizer):
        with pytest.raises(InvalidInputError, match=f"(found|expected) .*{found}") as refused:
            read(path)
        assert "Repo id" not in str(refused.value)


def test_what_nobody_expected_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli.doctor, "versions", broken)
    done = typed("doctor")
    assert done.stderr.strip() == f"narrowcast: error: RuntimeError: first line ({TRACEBACK}=1 shows where)"
    assert done.returncode == 1
    monkeypatch.setenv(TRACEBACK, "1")
    assert "in broken" in typed("doctor").stderr


def test_starting_shows_a_sign_of_life_where_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with narrowcast.__main__._starting():
        assert capsys.readouterr().err == "narrowcast: starting\r"
    assert capsys.readouterr().err == "\x1b[K"


def test_plans_reports_and_evaluations_are_short_and_tables_when_printed(tmp_path: Path) -> None:
    model = load_engine().load(save_random("llama", tmp_path / "random"), dtype="float32")
    text = [random_ids(1, 24, seed=seed) for seed in range(4)]
    plan = calibrate(model, text, tp_size=2, codec={"sum": "int4-feature", "logits": "int8-group128"})
    assert repr(plan) == "Plan(5 sites, tp_size 2, sum=int4-feature, logits=int8-group128)"
    assert [line.split()[:3] for line in str(plan).splitlines()[-4:]] == [
        ["kind", "codec", "sites"],
        ["sum", "feature", "3"],
        ["sum", "int8-group128", "1"],  # the last one, which nothing makes good
        ["logits", "int8-group128", "1"],
    ]
    found = evaluate(model, plan, text)
    assert repr(found.report).startswith("Report(6 sites, 96 tokens, ") and len(repr(found.report)) < 100
    assert len(str(found.report).splitlines()) == 2 + 1 + 6
    assert repr(found).startswith(f"Evaluation({plan!r}, KL ") and len(repr(found)) < 200
    assert "top-1 agreement" in str(found)
