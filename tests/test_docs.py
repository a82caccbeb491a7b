"""What the documents show is run: README's Python, docstrings, the example, names of presets."""

import doctest
import importlib
import math
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import narrowcast
from formats import FORMATS
from models import save_random
from narrowcast.codecs import PRESETS, FeatureCodec, GroupCodec, MinifloatCodec, Ranges, recipe, trellis
from narrowcast.codecs.catalogue import catalogue
from narrowcast.engines import load_engine
from narrowcast.plan.split import KINDS, Split

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf8")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the text, which it leaves open
def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "3.9 bits a value\n"


@pytest.mark.slow
def test_the_example_runs_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/all_reduce.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4.1875 bits a value, relative error 0.00")


MODULES = [
    module.name
    for module in pkgutil.walk_packages(narrowcast.__path__, "narrowcast.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_tell_the_truth(name: str) -> None:
    if name.startswith("narrowcast.engines.vllm."):
        pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm", exc_type=ModuleNotFoundError)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_examples_in_the_formats_are_right() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "formats.md"), module_relative=False)
    assert result.failed == 0 and result.attempted > 5


def test_the_table_of_presets_is_complete_and_right() -> None:
    rows = re.findall(
        r"^\|[^|]*\| `(.*)` \| `(.*)` \| ([\d.]+) \|$", (ROOT / "docs" / "formats.md").read_text("utf8"), re.MULTILINE
    )
    listed = list(catalogue())
    assert [name for name, _, _ in rows] == [entry.name for entry in listed] == list(PRESETS)
    for (name, spelling, bits), entry in zip(rows, listed, strict=True):
        assert str(recipe(spelling)) == name and spelling == entry.spelling
        assert float(bits) == float(f"{entry.bits_per_value:.5g}"), name


@pytest.mark.parametrize("spelt", FORMATS)
def test_bits_a_value_are_those_that_the_formats_tell(spelt: str) -> None:
    codec = recipe(spelt).codec(Ranges.of(torch.ones(1, 1, 4096)))
    found = 8 * codec.row_nbytes(4096) / 4096
    if isinstance(codec, FeatureCodec):
        assert found == codec.num_bits + (16 - codec.num_bits) * len(codec.outliers) / 4096
    elif isinstance(codec, GroupCodec):
        assert found == codec.num_bits + (16 if codec.symmetric else 80 if codec.spikes else 32) / codec.group_size
    elif isinstance(codec, MinifloatCodec):
        a_scale = 16 if codec.scale == "bf16" else 8
        of_token = 16 / 4096 if codec.scale == "e4m3" else 0
        assert found == codec.form.num_bits + a_scale / (codec.block_size or 4096) + of_token


def test_the_catalogue_tells_what_a_choice_turns_on() -> None:
    listed = {entry.name: entry for entry in catalogue()}
    needs = {name: entry.needs for name, entry in listed.items()}
    assert needs["int4-group128"] == needs["bf16"] == needs["nvfp4"] == "nothing"
    assert needs["int4-feature"] == needs["int4-random"] == "ranges"
    assert needs["allocated"] == needs["transform"] == "the whole model"
    assert listed["int4-feature"].plan_nbytes == 2 * 4096 + 8 * 64  # scales in BF16, places of outliers
    assert listed["bf16"].plan_nbytes == 0 and listed["transform"].plan_nbytes is None
    assert [name for name, entry in listed.items() if entry.product] == ["transform"]


def test_the_table_of_distortions_is_right() -> None:
    """Bits, what they leave of a normal value's variance, Shannon's bound, and the bits above it."""
    rows = re.findall(r"^\| (\d) \| (0\.\d{5}) \| 0\.\d{5} \| (0\.\d{5}) \| (0\.\d\d) \|$", METHOD, re.MULTILINE)
    assert rows == [
        (f"{bits}", f"{each:.5f}", f"{4.0**-bits:.5f}", f"{math.log2(each * 4.0**bits) / 2:.2f}")
        for bits, each in enumerate(trellis.DISTORTION[1:], start=1)
    ]


def test_the_picture_of_the_concepts_shows_the_sites_of_real_models(tmp_path: Path) -> None:
    """A Llama of two layers over 2 x 2 ranks, and the experts of a Mixtral; and the file is what the script draws."""
    drawing = runpy.run_path(str(ROOT / "docs" / "concepts_picture.py"))
    assert (ROOT / "docs" / "concepts.svg").read_text(encoding="utf8") == drawing["picture"]()
    *stages, experts = [{name: kind for what, _, kind, name in row if what == "site"} for _, _, row in drawing["ROWS"]]
    engine = load_engine()
    dense = engine.load(save_random("llama", tmp_path / "dense"))
    assert stages[0] | stages[1] == engine.sites(dense, Split(tp_size=2, pp_size=2))
    sparse = engine.load(save_random("mixtral", tmp_path / "sparse"))
    sites = engine.sites(sparse, Split(tp_size=2, experts="all_to_all"))
    assert experts == {name: kind for name, kind in sites.items() if "layers.1.mlp" in name}
    assert drawing["COLOURS"].keys() == set(KINDS)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf8")):
            assert (document.parent / target).exists(), f"{document}: {target}"
