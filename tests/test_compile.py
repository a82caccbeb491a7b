"""Compiled models: graphs without a break at the sums, which are opaque operators, and the answers of eager ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narrowcast
from models import random_ids, save_random
from narrowcast.codecs import CastCodec, Codec, kernels, recipe
from narrowcast.engines import load_engine
from narrowcast.plan import Plan
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Split
from narrowcast.runtime.products import Dense
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from ranks import Ranks

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in FP32 and a plan for two ranks, on disk."""
    folder = tmp_path_factory.mktemp("llama")
    save_random("llama", folder, dtype=torch.float32)
    narrowcast.calibrate(load_engine().load(folder), [random_ids(4, 32)], tp_size=2).save(folder / "model.plan")
    return folder


@torch.no_grad()
def answers(folder: Path, backend: str, *, simulate: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of the eager and of the compiled model, and bytes that each has sent."""
    engine, plan = load_engine(), Plan.load(folder / "model.plan")
    model = engine.load(folder) if simulate else engine.load(folder, split=Split(tp_size=2))
    with narrowcast.attach(model, plan, simulate=simulate) as handle:
        eager = model(input_ids=IDS, use_cache=False).logits
        sent = [sum(site.wire_bytes for site in handle.report().sites.values())]
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        found = compiled(input_ids=IDS, use_cache=False).logits
        sent.append(sum(site.wire_bytes for site in handle.report().sites.values()) - sent[0])
    return eager, found, sent


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_simulated_model_compiles_whole_and_answers_alike(saved: Path, backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled, sent = answers(saved, backend, simulate=True)
    assert torch.equal(compiled, eager)
    assert sent[0] == sent[1] > 0


def on_rank(folder: Path) -> tuple[Tensor, Tensor, list[int]]:
    return answers(folder, "aot_eager", simulate=False)


def test_a_split_model_compiles_whole_on_every_rank(saved: Path, ranks: Callable[[int], Ranks]) -> None:
    results = ranks(2).run(on_rank, saved)
    for eager, compiled, sent in results:
        assert torch.equal(compiled, eager)
        assert torch.equal(compiled, results[0][1])
        assert sent[0] == sent[1] > 0


def test_operators_say_what_they_return_and_what_they_change() -> None:
    """`opcheck`: schema, shape functions and behaviour under fake tensors agree, without a residue and with one."""
    codecs = {site: (recipe("int4-group32-sym"),) * 2 for site in ("s", "r")}
    everything = Simulator(Sites(codecs, (), "two_shot", torch.device("cpu"), chains=Chains(chains=(("s", "r"),))), 2)
    weight, x = torch.randn(8, 6), torch.randn(3, 5, 6)
    everything.row_parallel(
        "s", [Dense(lambda: weight[:, :3], 8, slice(0, 3)), Dense(lambda: weight[:, 3:], 8, slice(3, 6))]
    )
    everything.column_parallel("g", [4, 2])
    operators = torch.ops.narrowcast
    for residue in (torch.empty(0), torch.randn(4, 15, 8)):
        torch.library.opcheck(operators.row_parallel.default, (x, residue, "s", everything.handle))
        partials, lost = torch.stack([x, x]), residue[..., :6].contiguous()
        torch.library.opcheck(operators.all_reduce.default, (partials, lost, "r", everything.handle))
    torch.library.opcheck(operators.all_gather.default, (x, "g", everything.handle))


@pytest.mark.slow  # Inductor compiles C++
@torch.no_grad()
def test_inductor_keeps_payloads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Inductor fuses around the sums, a partial sum becomes the bytes that the reference kernels give it.

    Sums in FP32: logits then differ by what fused arithmetic rounds otherwise, some 30 roundings a layer of 2**-24
    each, which two layers pass on four times larger at most.
    """
    torch._dynamo.reset()
    seen: list[tuple[Codec, Tensor, dict[str, Any], Tensor]] = []
    encode = Codec.encode

    def recorded(self: Codec, x_TE: Tensor, *, residue: Tensor | None = None, **options: Any) -> Tensor:
        given = {"source": options["source"], "residue": None if residue is None else residue.clone()}
        payload_TB = encode(self, x_TE, residue=residue, **options)
        seen.append((self, x_TE.clone(), given, payload_TB.clone()))
        return payload_TB

    model = load_engine().load(save_random("llama", tmp_path, dtype=torch.float32))
    for codec in ("int4-feature", CastCodec(dtype=torch.float32)):
        plan = narrowcast.calibrate(model, [random_ids(4, 32)], tp_size=2, codec=codec)
        with narrowcast.attach(model, plan, simulate=True):
            eager = model(input_ids=IDS, use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True, backend="inductor")
            with monkeypatch.context() as patched:
                patched.setattr(Codec, "encode", recorded)
                found = compiled(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, eager, rtol=0, atol=2 * 30 * 4 * 2**-24 * eager.abs().max().item())
    assert len(seen) > 10
    with kernels.forced("reference"):
        for coding, x_TE, given, payload_TB in seen:
            assert torch.equal(coding.encode(x_TE, **given), payload_TB)
