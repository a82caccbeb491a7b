"""Decoder layers on ranks that run as they were recorded: the same bits, counts and errors, and when they do not."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

import narrowcast
from models import random_ids
from narrowcast import PeerLostError, Plan
from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.decoding import recorded as seam
from narrowcast.runtime import schedules
from narrowcast.runtime.schedules import NotRecordableError
from ranks import Ranks
from stepping import CONFIGS, FIRST, NUM_LAYERS, NUM_STEPS, by_modules, counted, same, steps
from transports import needs_mesh

pytestmark = needs_mesh
Pools = Callable[[int], Ranks]


def planned(name: str, folder: Path, weights: Any) -> Path:
    """A model and its plan for two ranks."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).bfloat16().save_pretrained(folder)
    model = load_engine().load(folder, weights=weights)
    narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2).save(folder / "plan")
    return folder


def loaded(folder: Path, weights: Any = "dense") -> tuple[Any, Plan]:
    plan = Plan.load(folder / "plan")
    return load_engine().load(folder, weights=weights, split=plan.split), plan


def both_ways(
    folder: Path, weights: Any, texts: tuple[int, int], simulated: list[Tensor], options: dict[str, Any]
) -> list[Any]:
    model, plan = loaded(folder, weights)
    with counted() as runs, narrowcast.attach(model, plan, **options) as handle:
        ours, report = steps(model, *texts), handle.report()
    with by_modules(), narrowcast.attach(model, plan, **options) as handle:
        plain, plain_report = steps(model, *texts), handle.report()
    return [runs[0], same(ours, plain), same(ours, simulated), report == plain_report]


def check(ranks: Pools, folder: Path, weights: Any, texts: tuple[int, int] = (1, 0), **options: Any) -> None:
    whole, plan = load_engine().load(folder, weights=weights), Plan.load(folder / "plan")
    with narrowcast.attach(whole, plan, simulate=True, **options):
        simulated = steps(whole, *texts)
    for runs, *alike in ranks(2).run(both_ways, folder, weights, texts, simulated, options):
        assert runs == NUM_LAYERS * (NUM_STEPS - FIRST)
        assert alike == [True] * 3, "as without recording, as simulated, as many bytes"


@pytest.mark.parametrize("weights", ["dense", "int8-group32"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_steps_have_the_bits_of_the_modules_and_of_the_simulation(
    ranks: Pools, tmp_path: Path, name: str, weights: str
) -> None:
    check(ranks, planned(name, tmp_path, weights), weights)


@pytest.mark.parametrize("num_sequences, padding", [(3, 0), (6, 0), (2, 4)])
def test_batches(ranks: Pools, tmp_path: Path, num_sequences: int, padding: int) -> None:
    """Padding comes with a mask of all places."""
    check(ranks, planned("llama", tmp_path, "int4-group32"), "int4-group32", (num_sequences, padding))


def padded_and_not(folder: Path) -> list[bool]:
    model, plan = loaded(folder)
    texts = (2, 4), (2, 0), (2, 4)
    with narrowcast.attach(model, plan):
        ours = [steps(model, *each) for each in texts]
    found = []
    for each, logits in zip(texts, ours, strict=True):
        with narrowcast.attach(model, plan):
            found.append(same(logits, steps(model, *each)))
    return found


def test_calls_with_a_mask_and_without_are_of_two_kinds(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(2).run(padded_and_not, planned("llama", tmp_path, "dense")) == [[True] * 3] * 2


@pytest.mark.parametrize("options", [{"feedback": False}, {"algorithm": "two_shot"}, {"deterministic": True}])
def test_plans_at_work_otherwise(ranks: Pools, tmp_path: Path, options: dict[str, Any]) -> None:
    check(ranks, planned("llama", tmp_path, "dense"), "dense", (2, 0), **options)


def left_alone(folder: Path) -> list[int]:
    model, plan = loaded(folder)
    with counted() as runs, narrowcast.attach(model, plan):
        steps(model)
    return runs


def in_inference_mode(folder: Path) -> tuple[int, bool]:
    model, plan = loaded(folder)
    with narrowcast.attach(model, plan):
        expected = steps(model)
    with counted() as runs, narrowcast.attach(model, plan), torch.inference_mode():
        found = steps(model)
    return runs[0], same(found, expected)


def test_inference_mode(ranks: Pools, tmp_path: Path) -> None:
    """Where operators that may copy come to the recorder as they are called."""
    assert (
        ranks(2).run(in_inference_mode, planned("llama", tmp_path, "dense"))
        == [(NUM_LAYERS * (NUM_STEPS - FIRST), True)] * 2
    )


@pytest.mark.parametrize("name", ["gemma2", "llama-biased", "phi3"])
def test_layers_that_do_something_else_are_left_alone(ranks: Pools, tmp_path: Path, name: str) -> None:
    """GELU, which PyTorch computes otherwise in vectors than one by one; biases of sums; columns that are gathered."""
    assert ranks(2).run(left_alone, planned(name, tmp_path, "dense")) == [[0], [0]]


def other_ways(folder: Path) -> dict[str, int]:
    """How many layers of a further step ran as recorded."""
    model, plan = loaded(folder)
    first, found = model.model.layers[0], {}

    def step(num_tokens: int = 1, **options: Any) -> int:
        with counted() as runs, torch.no_grad():
            ids = random_ids(1, 9)
            cache = model(ids, use_cache=True).past_key_values
            for _ in range(2):  # of which the first moves the cache
                model(ids[:, :1], past_key_values=cache, use_cache=True)
            runs[0] = 0
            model(ids[:, :num_tokens], past_key_values=cache, use_cache=True, **options)
            return runs[0]

    with narrowcast.attach(model, plan) as handle:
        step()
        found["once more"] = step()
        found["two tokens"] = step(num_tokens=2)
        with kernels.forced("reference"):
            found["reference"] = step()
        seen: list[Any] = []
        hook = first.self_attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
        found["a hook inside"] = step()
        assert len(seen) == 4, "a prompt and three tokens"
        hook.remove()
        handle.suspend()
        handle.resume()
        found["resumed"] = step()
        handle.report()
    with narrowcast.attach(model, plan, timed=True):
        found["timed"] = step()
    return found


def test_who_wants_the_modules_has_them(ranks: Pools, tmp_path: Path) -> None:
    for found in ranks(2).run(other_ways, planned("llama", tmp_path, "dense")):
        assert found == {
            "once more": NUM_LAYERS,
            "two tokens": 0,
            "reference": 0,
            "a hook inside": NUM_LAYERS - 1,
            "resumed": NUM_LAYERS,
            "timed": 0,
        }


def changed(folder: Path) -> list[bool]:
    """Whether answers are those of the modules after something in a layer has become another."""
    model, plan = loaded(folder)
    layer = model.model.layers[1]

    def other_weight() -> None:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2

    def other_forward() -> None:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x: forward(x) * 2

    def other_module() -> None:
        layer.mlp.act_fn = torch.nn.Identity()

    found = []
    for change in (other_weight, other_forward, other_module):
        with narrowcast.attach(model, plan):
            steps(model)
            change()
            ours = steps(model)
        with by_modules(), narrowcast.attach(model, plan):
            found.append(same(ours, steps(model)))
    return found


def test_what_is_changed_in_a_layer_counts(ranks: Pools, tmp_path: Path) -> None:
    for found in ranks(2).run(changed, planned("llama", tmp_path, "dense")):
        assert found == [True] * 3


def few_kinds(folder: Path) -> list[int]:
    seam.MAX_KINDS, most = 2, seam.MAX_KINDS
    model, plan = loaded(folder)
    found = []
    try:
        with narrowcast.attach(model, plan):
            for num_sequences in (1, 2, 3, 1):
                with counted() as runs:
                    steps(model, num_sequences)
                found.append(runs[0] // NUM_LAYERS)
    finally:
        seam.MAX_KINDS = most
    return found


def test_as_many_kinds_of_calls_are_kept(ranks: Pools, tmp_path: Path) -> None:
    recorded = NUM_STEPS - FIRST
    for found in ranks(2).run(few_kinds, planned("llama", tmp_path, "dense")):
        assert found == [recorded, recorded, 0, NUM_STEPS]


def decode_until_lost(folder: Path, marks: Path) -> tuple[bool, tuple[int, ...]]:
    model, plan = loaded(folder)
    with narrowcast.attach(model, plan, timeout_s=3.0), torch.no_grad():
        cache = model(random_ids(1, 9), use_cache=True).past_key_values
        with counted() as runs:
            try:
                while True:
                    model(random_ids(1, 1), past_key_values=cache, use_cache=True)
                    if runs[0] == NUM_LAYERS:
                        (marks / f"{dist.get_rank()}").touch()
            except PeerLostError as error:
                return runs[0] > 0, error.ranks


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named(tmp_path: Path, how: signal.Signals) -> None:
    pool = Ranks(2)
    try:
        pool.run(int)
        marks = tmp_path / "marks"
        marks.mkdir()
        pool.start(decode_until_lost, planned("llama", tmp_path, "dense"), marks)
        deadline = time.monotonic() + 60
        while len(list(marks.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(pool.processes[1].pid, how)
        assert pool.result(0) == (True, (1,))
    finally:
        pool.close()


def interrupted(folder: Path) -> bool:
    """True if rank 0 is interrupted while it waits for rank 1, and what it waited in is not used again."""
    model, plan = loaded(folder)
    with narrowcast.attach(model, plan), torch.no_grad():
        cache = model(random_ids(1, 9), use_cache=True).past_key_values
        for _ in range(3):
            model(random_ids(1, 1), past_key_values=cache, use_cache=True)
        layers = [each for each in gc.get_objects() if isinstance(each, seam.RecordedLayer)]
        assert [len(each._schedules) for each in layers] == [1] * NUM_LAYERS
        if dist.get_rank() == 1:
            dist.barrier()
            return True

        def sums() -> int:
            return sum(call is not None for call in layers[0]._wires._small_sums._calls.values())

        num_sums = sums()
        threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            model.model.layers[0](torch.zeros(1, 1, 128).bfloat16(), **arguments(model, cache))
        except KeyboardInterrupt:
            dist.barrier()
            kept = [len(each._schedules) for each in layers]
            return sorted(kept) == [0, 1] and sums() == num_sums - 2
        return False


def arguments(model: Any, cache: Any) -> dict[str, Any]:
    """What the model gives a layer for the next token."""
    places = torch.tensor([[cache.get_seq_length()]])
    turns = model.model.rotary_emb(torch.zeros(1, 1, 1).bfloat16(), position_ids=places)
    return {"attention_mask": None, "position_embeddings": turns, "past_key_values": cache}


def test_ctrl_c_while_waiting(tmp_path: Path) -> None:
    pool = Ranks(2)
    try:
        assert pool.run(interrupted, planned("llama", tmp_path, "dense")) == [True, True]
    finally:
        pool.close()


class TestValuesOneByOne:
    """The native operators that stand in for PyTorch's have its bits."""

    @pytest.mark.parametrize("num_values", [1, 31, 96, 1000])
    @pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2])
    @pytest.mark.parametrize("operator", [torch.add, torch.mul])
    @pytest.mark.parametrize("path", [path for path in kernels.available() if path != kernels.REFERENCE])
    def test_two(self, path: str, operator: Any, dtypes: tuple[torch.dtype, torch.dtype], num_values: int) -> None:
        wide = torch.randn(2, 3, 2 * num_values, generator=torch.Generator().manual_seed(0)) * 1e3
        a, b = wide.to(dtypes[0])[..., :num_values], wide.flip(0).to(dtypes[1])[..., num_values:]
        with kernels.forced(path):
            assert computes_again(lambda: operator(a, b))

    @pytest.mark.parametrize("function", [torch.nn.functional.silu, torch.relu])
    def test_functions(self, function: Any) -> None:
        """Of all arguments that there are."""
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        assert computes_again(lambda: function(every.view(4, -1)[:, 5:]))

    def test_rounding(self) -> None:
        """Of numbers that have no normal form, too."""
        x = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-39])
        assert computes_again(lambda: x.to(torch.bfloat16))

    @pytest.mark.parametrize(
        "compute",
        [
            lambda x: torch.add(x, x, alpha=2),
            lambda x: x.T.contiguous(),
            lambda x: x.T.reshape(-1),
            lambda x: x + 1,
            lambda x: x + x[0],
            lambda x: x.half() + 1,
            torch.exp,
        ],
    )
    def test_others_are_noticed(self, compute: Callable[[Tensor], Tensor]) -> None:
        for mode in torch.no_grad, torch.inference_mode:
            recorder = schedules.Recorder()
            with mode(), recorder.recording():
                compute(torch.ones(2, 3))
            with pytest.raises(NotRecordableError, match="aten"):
                recorder.steps([])


def computes_again(compute: Callable[[], Tensor]) -> bool:
    """True if what was noted of one of PyTorch's operators gives its bits once more."""
    recorder = schedules.Recorder()
    with recorder.recording():
        out = compute()
    ((name, operands),) = recorder._noted
    bits = torch.int32 if out.dtype is torch.float32 else torch.int16
    expected = torch.where(out.isnan(), torch.nan, out).view(bits)
    out.fill_(3)
    getattr(cpu.native, name)(*operands)
    return torch.equal(torch.where(out.isnan(), torch.nan, out).view(bits), expected)
