"""Plans: saved whole, loaded exactly, refused when they are not what they should be."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from models import calibrated
from narrowcast import InvalidInputError, Plan, PlanError
from narrowcast.errors import PlanFormatError, PlanMismatchError
from narrowcast.plan import ModelFingerprint, Site
from narrowcast.plan.plan import FORMAT_VERSION
from narrowcast.plan.split import Split
from narrowcast.plan.summary import bits_by_site

MODEL = ModelFingerprint(
    config={"model_type": "llama", "hidden_size": 70}, samples={"embedding": ["a", "b"], "o_proj": ["c", "d"]}
)


def plan(seed: int = 0, preset: str = "int4-feature") -> Plan:
    x_RTE = torch.randn(2, 30, 70, generator=torch.Generator().manual_seed(seed))
    sites = {
        name: Site(kind="sum", codecs=calibrated(preset, x_RTE * factor), error={"one_shot": 0.1, "two_shot": 0.2})
        for name, factor in (("layers.0.o_proj", 1.0), ("layers.0.down_proj", 2.0))
    }
    return Plan(split=Split(tp_size=2), model=MODEL, calibration={"codec": preset}, sites=sites)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan().save(tmp_path / "plan")
    return tmp_path / "plan"


@pytest.mark.parametrize("preset", ["int4-feature", "int4", "bf16", "feature(bits=3)"])
def test_load_gives_back_what_was_saved(tmp_path: Path, preset: str) -> None:
    original = plan(preset=preset)
    original.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.fingerprint == original.fingerprint
    assert (loaded.tp_size, loaded.model, loaded.calibration) == (2, MODEL, {"codec": preset})
    x_TE = torch.randn(5, 70)
    for name, site in original.sites.items():
        assert (loaded.sites[name].kind, loaded.sites[name].error) == (site.kind, site.error)
        for mine, theirs in zip(site.codecs, loaded.sites[name].codecs, strict=True):
            assert torch.equal(mine.encode(x_TE, source=0), theirs.encode(x_TE, source=0))


def test_the_fingerprint_sees_every_part() -> None:
    same, parts = plan(), [plan(seed=1), plan(preset="int4")]
    base = plan()
    parts += [
        Plan(split=Split(tp_size=4), model=base.model, calibration=base.calibration, sites=base.sites),
        Plan(split=Split(tp_size=2), model=base.model, calibration={"codec": "other"}, sites=base.sites),
        Plan(
            split=Split(tp_size=2),
            model=ModelFingerprint(config={}, samples=MODEL.samples),
            calibration=base.calibration,
            sites=base.sites,
        ),
    ]
    assert same.fingerprint == base.fingerprint
    assert len({base.fingerprint, *(part.fingerprint for part in parts)}) == len(parts) + 1


def test_saving_never_overwrites_without_being_told_to(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(InvalidInputError, match="a file that exists"):
        plan(seed=1).save(saved)
    assert saved.read_bytes() == before
    plan(seed=1).save(saved, overwrite=True)
    assert Plan.load(saved).fingerprint == plan(seed=1).fingerprint
    assert names(saved.parent) == ["plan"]


def test_a_folder_or_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="found a folder"):
        plan().save(tmp_path, overwrite=True)
    with pytest.raises(InvalidInputError, match="Create it"):
        plan().save(tmp_path / "no" / "plan")


FULL_DISK = """
import resource, signal, sys
import narrowcast
from narrowcast.plan import Plan
plan = Plan.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for path in sys.argv[2:]:
    try:
        plan.save(path, overwrite=True)
    except narrowcast.InvalidInputError as error:
        print(error)
"""


def test_a_full_disk_leaves_no_half_file_and_the_old_one_whole(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: the write fails half-way in the same place."""
    given, old, new = (tmp_path / name for name in ("given", "old", "new"))
    plan().save(given)
    old.write_text("old")
    command = [sys.executable, "-c", FULL_DISK, given, old, new]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    told = "expected a place that can be written, found file too large. Make room"
    assert all(f"{path}: {told}" in line for path, line in zip((old, new), done.stdout.splitlines(), strict=True))
    assert names(tmp_path) == ["given", "old"]
    assert old.read_text() == "old"


def test_another_process_that_saves_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan"
    serialize = safetensors.torch.save
    monkeypatch.setattr("safetensors.torch.save", lambda *args: (path.write_text("theirs"), serialize(*args))[1])
    with pytest.raises(InvalidInputError, match="a file that exists"):
        plan().save(path)
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["plan"]


def rewrite(path: Path, edit: Callable[[dict[str, object], dict[str, torch.Tensor]], None]) -> None:
    """Save the plan's file again with an edited header and tensors, the old digest kept."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["narrowcast"])
    edit(header, tensors)
    metadata["narrowcast"] = json.dumps(header)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("preset", ["int4-feature", "allocated"])
def test_bits_are_of_the_features_that_a_codec_is_calibrated_for(preset: str) -> None:
    """Whatever the hidden size of the model: logits and gathered columns have others."""
    codecs = calibrated(preset, torch.ones(2, 3, 320))
    wide = replace(plan(), sites={"lm_head": Site(kind="logits", codecs=codecs, error={})})
    assert bits_by_site(wide) == {"lm_head": tuple(8 * codec.row_nbytes(320) / 320 for codec in codecs)}


def test_another_format_version_is_refused(saved: Path) -> None:
    rewrite(saved, lambda header, _: header.update(format_version=FORMAT_VERSION + 1))
    versions = rf"format version {FORMAT_VERSION}, found version {FORMAT_VERSION + 1}"
    with pytest.raises(PlanFormatError, match=f"{versions}.*Calibrate again"):
        Plan.load(saved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header, _: header["split"].update(tp_size=4),
        lambda header, _: header["sites"].popitem(),
        lambda _, tensors: tensors["layers.0.o_proj/0/scale"].mul_(2),
        lambda _, tensors: tensors.update(more=torch.zeros(1)),
    ],
    ids=["tp_size", "site", "scale", "tensor"],
)
def test_an_altered_plan_is_refused(saved: Path, edit: Callable[..., None]) -> None:
    rewrite(saved, edit)
    with pytest.raises(PlanFormatError, match="found altered ones"):
        Plan.load(saved)


def test_a_plan_cut_short_or_damaged_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for length in [0, 1, 7, 8, 9, 100, *torch.randint(len(whole), (40,), generator=generator).tolist()]:
        saved.write_bytes(whole[:length])
        with pytest.raises(PlanFormatError):
            Plan.load(saved)
    for place in [*range(0, 64, 7), *torch.randint(len(whole), (200,), generator=generator).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        saved.write_bytes(damaged)
        with pytest.raises(PlanFormatError):
            Plan.load(saved)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanFormatError, match="no such file"):
        Plan.load(tmp_path / "missing")
    with pytest.raises(PlanFormatError, match="found a folder"):
        Plan.load(tmp_path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(PlanFormatError, match="a safetensors file of another kind"):
        Plan.load(tmp_path / "other")
    (tmp_path / "text").write_text('{"a": "text"}')
    with pytest.raises(PlanFormatError, match=r"found another file, or a part of one \(header too large\)"):
        Plan.load(tmp_path / "text")


def signed(path: Path, header: object) -> None:
    """A file with a valid digest over whatever `header` says: what a hostile or broken writer may leave."""
    from narrowcast.plan.plan import _digest

    text = json.dumps(header)
    metadata = {"narrowcast": text, "sha256": _digest(text, {})}
    path.write_bytes(safetensors.torch.save({}, metadata))


UNKNOWN = {"codec": "os.system", "config": {}, "tensors": []}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"format_version": 1},
        {"format_version": 1, "split": {"tp_size": 2}, "model": {"config": {}, "samples": {}, "more": 1}},
        {
            "format_version": 1,
            "split": {"tp_size": 2},
            "model": {"config": {}, "samples": {}},
            "calibration": {},
            "sites": [],
        },
        {
            "format_version": 1,
            "split": {"tp_size": 2},
            "model": {"config": {}, "samples": {}},
            "calibration": {},
            "sites": {"a": {"kind": "sum", "error": {}, "stages": [UNKNOWN]}},
        },
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: object) -> None:
    signed(tmp_path / "plan", header)
    with pytest.raises(PlanFormatError):
        Plan.load(tmp_path / "plan")


def test_another_model_or_tp_size_is_refused_with_what_to_do() -> None:
    made = plan()
    made.check(MODEL, Split(tp_size=2))
    with pytest.raises(PlanMismatchError, match=r"tp_size 2, .*found tp_size 4. Calibrate with tp_size 4"):
        made.check(MODEL, Split(tp_size=4))
    other = ModelFingerprint(config={"model_type": "llama", "hidden_size": 71}, samples=MODEL.samples)
    with pytest.raises(PlanMismatchError, match="hidden_size = 70, found 71"):
        made.check(other, Split(tp_size=2))
    other = ModelFingerprint(config=MODEL.config, samples=MODEL.samples | {"o_proj": ["c", "x"]})
    with pytest.raises(PlanError, match="weights that the plan was calibrated on in o_proj"):
        made.check(other, Split(tp_size=2))


def test_a_rank_checks_the_samples_that_it_holds() -> None:
    made = plan()
    made.check(
        ModelFingerprint(config=MODEL.config, samples={"embedding": ["a", None], "o_proj": [None, "d"]}),
        Split(tp_size=2),
    )
    with pytest.raises(PlanMismatchError):
        made.check(
            ModelFingerprint(config=MODEL.config, samples={"embedding": ["a", None], "o_proj": [None, "x"]}),
            Split(tp_size=2),
        )
