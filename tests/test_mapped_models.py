"""Models packed into the kernels' layout: the same answers, nothing copied, and larger than memory."""

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import gguf_files
import narrowcast
from commands import typed
from conftest import MODEL
from models import random_ids
from narrowcast.engines import load_engine
from narrowcast.engines.base import Weights
from narrowcast.engines.transformers.decoding.layers import FUSED
from narrowcast.engines.transformers.files import streaming
from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.errors import InvalidInputError
from narrowcast.weights.folders.kernels import KernelsFolder
from narrowcast.weights.layers import PackedEmbedding, PackedLinear
from narrowcast.weights.mapped import MappedFile
from ranks import Ranks
from test_packed_models import CONFIGS, load, logits, on_rank, saved
from transports import needs_mesh

Pools = Callable[[int], Ranks]


def packed(path: Path, folder: Path, weights: Weights = "stored") -> Path:
    folder.mkdir()
    load_engine().pack(path, folder, weights=weights)
    return folder


def matrices(model: nn.Module) -> Iterator[Any]:
    return (each.matrix for each in model.modules() if isinstance(each, PackedLinear | PackedEmbedding))


def file_of(model: nn.Module) -> int:
    """The place of the file in memory; all matrices are in it."""
    (place,) = {matrix.blocks.untyped_storage().data_ptr() for matrix in matrices(model)}
    return int(place)


@pytest.mark.parametrize("weights", ["int4-group32", "int8-group32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_answers_as_one_packed_at_load(tmp_path: Path, name: str, weights: Weights) -> None:
    """Bit for bit; nothing of it is copied, embedding and norms included."""
    expected = load(saved(name, tmp_path / "source"), weights)
    found = load(packed(tmp_path / "source", tmp_path / "packed", weights), "stored")
    ids = random_ids(2, 12)

    assert torch.equal(logits(found, ids), logits(expected, ids))
    steps = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (found, expected)]
    assert torch.equal(*steps)
    assert {each.untyped_storage().data_ptr() for each in found.parameters()} == {file_of(found)}
    assert load_engine().fingerprint(found) == load_engine().fingerprint(load(tmp_path / "source", "dense"))


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"phi3"}))
def test_layers_asked_at_once_are_one_matrix_of_the_file(tmp_path: Path, name: str) -> None:
    found = load(packed(saved(name, tmp_path / "source"), tmp_path / "packed", "int4-group32"), "stored")
    fused = [vars(module)[name] for module in found.modules() for name in FUSED if name in vars(module)]

    of_two_layers = {"mixtral": 2 + 2 * 4, "qwen3-moe": 2 + 1 + 8}.get(name, 4)  # queries, gates by expert
    assert len(fused) == of_two_layers
    assert {each._matrix.blocks.untyped_storage().data_ptr() for each in fused} == {file_of(found)}


def test_what_is_written_into_weights_does_not_reach_the_file(tmp_path: Path) -> None:
    folder = packed(saved("llama", tmp_path / "source"), tmp_path / "packed", "int4-group32")
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder, "stored")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", gguf_files.CONFIGS | gguf_files.INCOMPLETE)
def test_a_gguf_file_is_packed_as_it_is(tmp_path: Path, name: str) -> None:
    path, ids = tmp_path / "model.gguf", random_ids(2, 12)
    gguf_files.write_gguf(path, name, gguf_files.Kind.Q4_0)
    expected, found = load(path, "stored"), load(packed(path, tmp_path / "packed"), "stored")

    assert torch.equal(logits(found, ids), logits(expected, ids))
    assert load_engine().fingerprint(found) == load_engine().fingerprint(expected)
    for each in (matrix.format for matrix in matrices(found)):
        assert each.name == "int4-group32"


def test_a_packed_model_may_be_packed_again_or_unpacked(tmp_path: Path) -> None:
    first = packed(saved("llama", tmp_path / "source"), tmp_path / "first", "int4-group32")
    again = packed(first, tmp_path / "again")
    dense = load(first, "dense")

    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    layer = load(first, "stored").model.layers[0].mlp.up_proj
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, layer.dequantized())


@needs_mesh
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "mixtral"])
def test_real_ranks_take_their_parts_of_the_file(ranks: Pools, tmp_path: Path, name: str) -> None:
    """But where these begin within a block: of 160 of 320 columns, a multiple of 64, and 51 of 101 rows, of 16."""
    ids, source = random_ids(2, 9), saved(name, tmp_path / "source")
    folder = packed(source, tmp_path / "packed", "int4-group32")
    plan = narrowcast.calibrate(load(folder, "stored"), [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    for each in (source, folder):
        plan.save(each / "plan")

    expected = ranks(2).run(on_rank, source, "int4-group32", ids)
    found = ranks(2).run(on_rank, folder, "stored", ids)

    for mine, theirs in zip(found, expected, strict=True):
        assert mine[1] == theirs[1], "bytes of weights"
        for one, other in zip(mine[:1] + mine[2:], theirs[:1] + theirs[2:], strict=True):
            assert torch.equal(one, other)
    assert ranks(2).run(copied, folder) == [{"down_proj", "lm_head"}] * 2


def copied(folder: Path) -> set[str]:
    model = load(folder, "stored", split=narrowcast.Plan.load(folder / "plan").split)
    place = model.model.norm.weight.untyped_storage().data_ptr()
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, PackedLinear)]
    return {name.split(".")[-1] for name, each in layers if each.matrix.blocks.untyped_storage().data_ptr() != place}


def test_weights_that_would_not_be_packed_are_refused(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    for weights in ("stored", "dense"):
        with pytest.raises(InvalidInputError, match="expected weights in few bits, found all as values"):
            packed(source, tmp_path / weights, weights)  # type: ignore[arg-type]


def test_others_refuse_a_packed_folder(tmp_path: Path) -> None:
    """Transformers warns of an unknown quantization, narrowcast, and then of shapes."""
    folder = packed(saved("llama", tmp_path / "source"), tmp_path / "packed", "int4-group32")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    with pytest.raises(InvalidInputError, match="expected weights packed in version 1, found 2"):
        load(folder, "stored")


def test_matrices_begin_with_lines_of_the_cache(tmp_path: Path) -> None:
    folder = packed(saved("gemma2", tmp_path / "source"), tmp_path / "packed", "int4-group32")
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, KernelsFolder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(checkpoint.names)
    for name in checkpoint.names:
        if checkpoint.format(name):
            assert checkpoint.matrix(name, slice(None), slice(None)).blocks.data_ptr() % 64 == 0


def test_pack_writes_a_whole_folder_and_replaces_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    four_bits = "--weights", "int4-group32"
    assert typed("pack", MODEL, out, *four_bits).stdout == f"{out}: {MODEL}, 5 MB\n"
    assert {path.name for path in out.iterdir()} == {path.name for path in MODEL.iterdir()} | {"packing.json"}
    assert (
        load_engine().load_tokenizer(out)("The sea").input_ids
        == load_engine().load_tokenizer(MODEL)("The sea").input_ids
    )
    assert "found one that exists" in typed("pack", MODEL, out, *four_bits).stderr
    assert "something that pack has not written" in typed("pack", MODEL, foreign, *four_bits, "--overwrite").stderr
    assert "a folder apart from MODEL" in typed("pack", out, out, "--overwrite").stderr
    assert typed("pack", MODEL, out, "--weights", "int8-group32", "--overwrite").returncode == 0
    assert load(out, "stored").model.layers[0].mlp.up_proj.matrix.format.num_bits == 8

    monkeypatch.setattr("narrowcast.weights.folders.writing.os.fsync", full)
    assert (
        "a place that can be written, found no space left"
        in typed("pack", MODEL, out, *four_bits, "--overwrite").stderr
    )
    assert load(out, "stored").model.layers[0].mlp.up_proj.matrix.format.num_bits == 8
    assert {path.name for path in tmp_path.iterdir()} == {"out", "foreign"}


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


class Watched(MappedFile):
    """A file that notes what is read ahead and dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.notes: list[tuple[str, int]] = []

    def read(self, *views: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.notes += [("read", view.data_ptr()) for view in views]
        super().read(*views)

    def forget(self, *views: torch.Tensor, everywhere: bool = True) -> None:
        if everywhere:
            self.notes += [("forget", view.data_ptr()) for view in views]
        super().forget(*views, everywhere=everywhere)


def reader_of(model: Any) -> streaming.Reader:
    (hook,) = model.model.layers[0]._forward_pre_hooks.values()
    return hook.func.__self__  # type: ignore[no-any-return]


@pytest.fixture
def larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Any]:
    """A model of eight layers and an output layer, of which a share fits into the memory that is free."""
    sizes = CONFIGS["llama"]()
    sizes.num_hidden_layers = 8
    AutoModelForCausalLM.from_config(sizes).bfloat16().save_pretrained(tmp_path / "source")
    folder = packed(tmp_path / "source", tmp_path / "packed", "int4-group32")
    monkeypatch.setattr("narrowcast.weights.folders.tensors.MappedFile", Watched)

    def make(share: float) -> Any:
        whole = load(tmp_path / "source", "int4-group32")
        nbytes = sum(matrix.nbytes for matrix in matrices(whole))
        monkeypatch.setattr(streaming, "free_host_nbytes", lambda: int(share * nbytes / streaming.SHARE))
        return whole, load(folder, "stored")

    return make


def test_a_model_that_fits_is_not_streamed(larger: Callable[[float], Any]) -> None:
    _, model = larger(1.01)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_larger_than_memory_answers_the_same(larger: Callable[[float], Any]) -> None:
    whole, model = larger(0.7)
    ids = random_ids(1, 7)
    assert torch.equal(logits(model, ids), logits(whole, ids))
    told = [each.generate(ids, max_new_tokens=5, do_sample=False) for each in (model, whole)]
    assert torch.equal(*told)


def test_layers_that_stay_are_read_once_and_others_for_every_token(larger: Callable[[float], Any]) -> None:
    _, model = larger(0.7)
    for _ in range(3):
        logits(model, random_ids(1, 3))
    reader, notes = reader_of(model), reader_of(model)._file.notes  # type: ignore[attr-defined]
    for thread in (reader._reader, reader._dropper):
        thread.shutdown()
    reads = [place for what, place in notes if what == "read"]
    counts = {number: reads.count(weights[0].data_ptr()) for number, weights in enumerate(reader._parts)}
    dropped = {place for what, place in notes if what == "forget"}

    assert 3 <= len(reader._streamed) < 9, "some stay, and others do not"
    assert all((counts[number] > 2) == (number in reader._streamed) for number in counts)
    assert dropped == {weight.data_ptr() for number in reader._streamed for weight in reader._parts[number]}


def test_layers_that_do_not_stay_are_spread() -> None:
    parts = [streaming.Part(nn.Identity(), [torch.empty(100, dtype=torch.uint8)])] * 12
    assert streaming.streamed(parts, 1100) == {2, 6, 10}, "with room for the one that is read ahead"
    assert streaming.streamed(parts, 800) == {1, 3, 5, 7, 9, 11}
    assert streaming.streamed(parts, 200) == streaming.streamed(parts, 0) == set(range(12))


def test_reading_ends_with_the_model(larger: Callable[[float], Any]) -> None:
    _, model = larger(0.7)
    logits(model, random_ids(1, 3))
    reader = reader_of(model)
    (thread,) = reader._reader._threads
    gone = weakref.ref(reader)
    del reader, model
    gc.collect()
    thread.join(10)
    assert gone() is None and not thread.is_alive()
