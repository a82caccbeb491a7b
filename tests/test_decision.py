"""Which way a sum takes: what was measured decides, alike on every rank; deterministic=True fixes one for all sizes."""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import narrowcast
from conftest import MODEL
from models import random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.cli import app
from narrowcast.codecs import AllocatedRecipe, Ranges, TransformCodec, recipe
from narrowcast.collectives import simulate
from narrowcast.engines import load_engine
from narrowcast.perf.tune import GROWTH, LARGEST_NBYTES, Timing, Tuning, Way, changes, tune
from narrowcast.plan import ModelFingerprint, Site
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.reports import Report
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites, plain
from narrowcast.transport import TcpTransport, TorchDistributedTransport
from ranks import Ranks
from transports import needs_mesh

NUM_FEATURES = 64
CPU = torch.device("cpu")
EVERYWHERE = {"sum": "int4-feature", "last": "int4-feature"}
NATIVE, PLAIN, ONE, TWO = map(Choice.parse, ("native", "plain one_shot", "coded one_shot", "coded two_shot"))
TABLE = Decisions(
    coded={NUM_FEATURES: ((1, NATIVE), (4, PLAIN), (8, ONE), (16, TWO))},
    plain={NUM_FEATURES: ((1, NATIVE),)},
    waits={NUM_FEATURES: ((1, 0.5e-3), (4, 2e-3))},
    weights_gbps=10.0,
)


def codecs(world_size: int, preset: str = "int4-feature") -> tuple[Any, ...]:
    x_RTE = torch.randn(world_size, 32, NUM_FEATURES, generator=torch.Generator().manual_seed(1))
    return recipe(preset).codec(Ranges.of(x_RTE)), recipe(preset).codec(Ranges.of(x_RTE.sum(0)[None]))


def inputs(num_tokens: int, world_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return list(torch.randn(world_size, num_tokens, NUM_FEATURES, generator=generator).bfloat16().unbind())


def a_plan(world_size: int, decisions: Decisions = Decisions()) -> Plan:
    site = Site(kind="sum", codecs=codecs(world_size), error={})
    model = ModelFingerprint(config={"hidden_size": NUM_FEATURES, "vocab_size": 101}, samples={})
    return Plan(split=Split(tp_size=world_size), model=model, calibration={}, sites={"s": site}, decisions=decisions)


@pytest.mark.parametrize(
    ("num_tokens", "choice"),
    [(0, NATIVE), (1, NATIVE), (3, NATIVE), (4, PLAIN), (7, PLAIN), (8, ONE), (15, ONE), (16, TWO), (10**9, TWO)],
)
def test_a_choice_holds_from_its_number_of_tokens_on(num_tokens: int, choice: Choice) -> None:
    assert TABLE.choice(num_tokens, NUM_FEATURES, coded=True) == choice
    assert TABLE.choice(num_tokens, NUM_FEATURES, coded=False) == NATIVE
    assert TABLE.choice(num_tokens, NUM_FEATURES + 1, coded=True) is None, "nothing was measured"


def test_decisions_are_saved_with_the_plan_and_change_its_fingerprint(tmp_path: Path) -> None:
    plan = a_plan(2, TABLE)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").decisions == TABLE
    assert plan.fingerprint != replace(plan, decisions=Decisions()).fingerprint


def test_chunks_are_left_out_where_little_is_waited_for() -> None:
    """1.5 ms in a chunk of 256 tokens, or of 128."""
    slow, fast = (Decisions(waits={NUM_FEATURES: ((1, 0.0), (num_tokens, 1.5e-3))}) for num_tokens in (256, 512))
    assert slow.chunks_pay(NUM_FEATURES, 256 * NUM_FEATURES)
    assert not fast.chunks_pay(NUM_FEATURES, 256 * NUM_FEATURES)
    assert Decisions().chunks_pay(NUM_FEATURES, 1) and fast.chunks_pay(NUM_FEATURES + 1, 1), "nothing was measured"


def exchanges_of(waits: dict[int, Any]) -> int:
    """How many exchanges a sum of 64 tokens takes, in chunks of eight."""
    transport, started = TcpTransport(), []
    transport.chunk_values, exchange = 8 * NUM_FEATURES, transport.exchange  # type: ignore[misc]
    transport.exchange = lambda *args, **options: (started.append(1), exchange(*args, **options))[1]  # type: ignore
    sites = Sites({"s": codecs(2)}, (), "auto", CPU, decisions=Decisions(waits=waits))
    wires = Communicator(sites, tp=transport, pp=None)
    wires._small_sums.take = lambda y_TE: False  # type: ignore[method-assign]
    wires.sum([inputs(64, 2)[transport.rank]], "s")
    return len(started)


@needs_mesh
def test_a_sum_travels_in_chunks_or_at_once_as_the_table_says(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(exchanges_of, {}) == [8, 8]
    assert ranks(2).run(exchanges_of, {NUM_FEATURES: ((1, 0.0), (64, 1e-4))}) == [1, 1]
    assert ranks(2).run(exchanges_of, {NUM_FEATURES: ((1, 0.01),)}) == [8, 8]


@pytest.mark.parametrize("text", ["", "coded", "native one_shot", "zipped one_shot"])
def test_a_choice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a choice is one of"):
        Choice.parse(text)


def decided_sums(sizes: list[int]) -> list[Tensor]:
    transport = TorchDistributedTransport()
    rank, world_size = transport.rank, transport.world_size
    sites = Sites({"s": codecs(world_size)}, (), "auto", CPU, decisions=TABLE)
    communicator = Communicator(sites, tp=transport, pp=None)
    return [communicator.sum([inputs(num_tokens, world_size)[rank]], "s") for num_tokens in sizes]


def test_ranks_and_simulation_go_the_way_that_was_decided(ranks: Callable[[int], Ranks]) -> None:
    sizes = [1, 4, 8, 20]
    per_rank = ranks(3).run(decided_sums, sizes)
    for place, num_tokens in enumerate(sizes):
        given, pair = inputs(num_tokens, 3), codecs(3)
        expected = {
            1: torch.stack(given).float().sum(0).bfloat16(),  # native: in whatever order and precision
            4: simulate.all_reduce(given, codec=plain(torch.bfloat16).codecs, algorithm="one_shot"),
            8: simulate.all_reduce(given, codec=pair, algorithm="one_shot"),
            20: simulate.all_reduce(given, codec=pair, algorithm="two_shot"),
        }[num_tokens]
        simulated = Simulator(Sites({"s": pair}, (), "auto", CPU, decisions=TABLE), 3).sum(given, "s")
        for found in (*(results[place] for results in per_rank), simulated):
            if num_tokens == 1:  # gloo adds in BF16: two additions, half an ulp (2**-9) each of what is at most 12
                assert torch.allclose(found.float(), expected.float(), atol=2 * 12 * 2**-9, rtol=0)
            else:
                assert torch.equal(found, expected)


def test_a_named_algorithm_and_deterministic_ignore_the_table() -> None:
    named = Sites({"s": codecs(3)}, (), "one_shot", CPU, decisions=TABLE)
    fixed = Sites({"s": codecs(3)}, (), "auto", CPU, decisions=TABLE, deterministic=True)
    for num_tokens in (1, 5, 16, 1000):
        assert named.choice("s", num_tokens, NUM_FEATURES, 3) == ONE
        assert fixed.choice("s", num_tokens, NUM_FEATURES, 3) == TWO
    per_token_scales = recipe("fp8").codec(Ranges.of(torch.ones(1, 1, 1)))
    fixed = Sites({"s": (per_token_scales,) * 2}, (), "auto", CPU, deterministic=True)
    assert {str(fixed.choice("s", num_tokens, NUM_FEATURES, 3)) for num_tokens in (1, 5, 1000)} == {"coded one_shot"}


def test_deterministic_results_do_not_depend_on_the_batch() -> None:
    """A token's sum has the same bits alone and among others."""
    sites = Sites({"s": codecs(3, "group(bits=4, size=32)")}, (), "auto", CPU, decisions=TABLE, deterministic=True)
    given = inputs(20, 3)
    whole = Simulator(sites, 3).sum(given, "s")
    for token in range(20):
        alone = Simulator(sites, 3).sum([x_TE[token : token + 1] for x_TE in given], "s")
        assert torch.equal(alone[0], whole[token])


def test_a_coded_way_must_gain_enough() -> None:
    timing = Timing(num_tokens=1, nbytes=128, seconds={NATIVE: 1.0, PLAIN: 1.1, ONE: 0.96}, measured=True)
    assert timing.best(("coded", "plain", "native")) == NATIVE
    faster = replace(timing, seconds={NATIVE: 1.0, PLAIN: 1.1, ONE: 0.94})
    assert faster.best(("coded", "plain", "native")) == ONE
    assert faster.best(("plain", "native")) == NATIVE


def tuned(delay_s: float) -> Any:
    """Uncompressed sums are made slow, so that what is found is known."""
    transport = TorchDistributedTransport()
    native = transport.native_all_reduce

    def slow(x: Tensor) -> Tensor:
        time.sleep(delay_s)
        return native(x)

    transport.native_all_reduce = slow  # type: ignore[method-assign]
    return tune(a_plan(transport.world_size), transport, budget_s=0.3)


def test_all_ranks_find_what_the_first_one_measured(ranks: Callable[[int], Ranks]) -> None:
    found = ranks(2).run(tuned, 0.02)
    assert found[0] == found[1]
    tuning = found[0]
    assert {str(choice) for choice in tuning.timings[0].seconds} == {"native", "plain one_shot", "coded one_shot"}
    assert tuning.timings[0].measured
    assert not tuning.timings[-1].measured, "64 MiB do not fit into 0.3 s with 20 ms for each native sum"
    assert tuning.timings[-1].nbytes > LARGEST_NBYTES // GROWTH
    assert tuning.decisions.choice(1, NUM_FEATURES, coded=True) != NATIVE
    for timing in tuning.timings:
        if timing.measured:
            assert timing.seconds[NATIVE] > 0.02
    measured = [timing for timing in tuning.timings if timing.measured]
    assert tuning.decisions.waits == {NUM_FEATURES: [(timing.num_tokens, timing.waiting_s) for timing in measured]}
    assert tuning.decisions.weights_gbps > 0 and tuning.decisions.logits_s > 0


def transformed_plan(world_size: int) -> Plan:
    """Half of the features as components, of each rank and of the sum."""
    plan, kept, recipe = a_plan(world_size), NUM_FEATURES // 2, AllocatedRecipe(bits=2.0)
    eye = torch.eye(NUM_FEATURES)[:kept].bfloat16()
    pair = tuple(
        TransformCodec(
            size=NUM_FEATURES,
            analysis=eye.expand(sources, 1, -1, -1),
            synthesis=eye.T.expand(sources, 1, -1, -1),
            components=recipe.codec(Ranges.of(torch.ones(sources, 1, kept))),
        )
        for sources in (world_size, 1)
    )
    return replace(plan, sites={"s": Site(kind="sum", codecs=pair, error={})})


def tuned_with_slow_synthesis(delay_s: float) -> Any:
    transport, synthesized = TorchDistributedTransport(), TransformCodec._synthesized

    def slow(self: TransformCodec, z_TK: Tensor, source: int) -> Tensor:
        time.sleep(delay_s)
        return synthesized(self, z_TK, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformCodec, "_synthesized", slow)
        return tune(transformed_plan(transport.world_size), transport, budget_s=3.0)


def test_synthesis_counts_in_the_time_of_a_coded_sum(ranks: Callable[[int], Ranks]) -> None:
    """Made slow, it loses against plain sums, by whichever algorithm."""
    found = ranks(3).run(tuned_with_slow_synthesis, 0.005)
    assert found[0] == found[1] == found[2]
    coded = [
        {way: seconds for way, seconds in timing.seconds.items() if way.form == "coded"}
        for timing in found[0].timings
        if timing.measured
    ]
    assert coded[0].keys() == {ONE}, "the components of a single token stay together"
    assert coded[1].keys() == {ONE, TWO}
    assert min(seconds for ways in coded for seconds in ways.values()) > 0.005
    assert found[0].decisions.choice(1, NUM_FEATURES, coded=True).form != "coded"


def wrong_ranks() -> None:
    with pytest.raises(InvalidInputError, match="2 ranks, as the plan has"):
        tune(a_plan(2), TorchDistributedTransport())


def test_tuning_wants_as_many_ranks_as_the_plan_has(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(wrong_ranks)


def attached(folder: Path, plan: bytes, ids: Tensor) -> list[tuple[Tensor, Report]]:
    model = load_engine().load(folder, split=Split(tp_size=2))
    found = []
    for deterministic in (False, True):
        with narrowcast.attach(model, Plan.from_bytes(plan, "memory"), deterministic=deterministic) as handle:
            with torch.no_grad():
                logits = model(ids).logits
            found.append((logits, handle.report()))
    return found


def test_scores_are_of_the_codecs_however_a_plan_was_tuned(tmp_path: Path) -> None:
    model = load_engine().load(MODEL)
    plan = narrowcast.calibrate(
        model, [random_ids(1, 32)], tp_size=2, codec={"sum": "int4-feature", "last": "int4-feature"}
    )
    tables = [{model.config.hidden_size: ((1, choice),)} for choice in (PLAIN, NATIVE)]
    replace(plan, decisions=Decisions(*tables)).save(tmp_path / "plan")
    options = "--num-samples", "1", "--max-seq-len", "32", "--json", str(tmp_path / "r.json")
    done = run_cli("evaluate", str(MODEL), "--plan", str(tmp_path / "plan"), *options)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf8"))["bits_per_value"] < 5


def told(folder: Path, plan: bytes) -> str:
    model = load_engine().load(folder, split=Split(tp_size=2))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("narrowcast").addHandler(handler)
    narrowcast.attach(model, Plan.from_bytes(plan, "memory"), transport="torch").remove()
    logging.getLogger("narrowcast").removeHandler(handler)
    return "\n".join(records)


def test_a_plan_that_was_tuned_over_another_transport_is_told(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    plan = narrowcast.calibrate(load_engine().load(folder), [random_ids(1, 8)], tp_size=2, codec="int4-feature")
    for transport, warns in (("tcp", True), ("torch.distributed", False), ("", False)):
        data = replace(plan, decisions=replace(TABLE, transport=transport)).to_bytes()
        for messages in ranks(2).run(told, folder, data):
            assert ("was tuned over tcp" in messages) == warns


def test_an_attached_model_follows_its_plan(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Where uncompressed sums are faster nothing is coded, unless one way is asked for all sizes."""
    folder, ids = save_random("llama", tmp_path / "model"), random_ids(1, 12)
    model = load_engine().load(folder)
    plan = narrowcast.calibrate(model, [ids], tp_size=2, codec=EVERYWHERE)
    tables = [{model.config.hidden_size: ((1, choice),)} for choice in (PLAIN, NATIVE)]
    data = replace(plan, decisions=Decisions(*tables)).to_bytes()
    with torch.no_grad():
        exact = model(ids).logits.float()
    for (plain_logits, plain_report), (coded_logits, coded_report) in ranks(2).run(attached, folder, data, ids):
        assert plain_report.bits_per_value == 16
        assert coded_report.bits_per_value < 5  # type: ignore[operator]
        assert (plain_logits - exact).abs().max() < (coded_logits - exact).abs().max()


def test_tuning_says_what_it_changes() -> None:
    """Between three ranks: coded by two_shot before, now in one's own dtype, and natively, with what these send."""
    plan = a_plan(3)
    timings = [
        Timing(num_tokens=1, nbytes=128, seconds={PLAIN: 1e-4, TWO: 2e-4, ONE: 3e-4}, measured=True),
        Timing(num_tokens=256, nbytes=1 << 15, seconds={NATIVE: 1e-3, ONE: 3e-3}, measured=True),
    ]
    decisions = Decisions(coded={NUM_FEATURES: ((1, PLAIN), (64, NATIVE))})
    found = changes(plan, Tuning(decisions=decisions, timings=timings))
    before, after = found[1]
    assert (before.choice, before.seconds) == (TWO, 2e-4)
    assert before.nbytes < 2 * NUM_FEATURES and after == Way(choice=PLAIN, seconds=1e-4, nbytes=2 * 2 * NUM_FEATURES)
    before, after = found[256]
    assert (before.choice, before.seconds) == (TWO, None)
    assert after == Way(choice=NATIVE, seconds=1e-3, nbytes=2 * 2 * 2 * 256 * NUM_FEATURES // 3)


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run_tune(*arguments: str) -> Any:
    return run_cli("tune", *arguments)


def test_the_command_completes_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, new, temporary = tmp_path / "a.plan", tmp_path / "b.plan", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    a_plan(2).save(plan)
    before = plan.read_bytes()
    assert "not tuned: every sum is coded" in run_cli("inspect", str(plan)).output
    done = run_tune(str(plan), "--output", str(new))
    assert done.exit_code == 0, done.output
    assert not list(temporary.glob("narrowcast-*")), "the launcher's logs are gone"
    told = run_cli("inspect", str(new)).output
    assert f"sums of {NUM_FEATURES} features" in told and "us at 1 tokens" in told
    assert "coded one_shot" in done.output
    assert "sums of a token: coded one_shot, " in done.output and "sums of 256 tokens: coded one_shot, " in done.output
    assert "One machine is not timed beside the ranks" in done.output, "the plan does not tell sizes"
    assert plan.read_bytes() == before
    tuned = Plan.load(new)
    assert tuned.decisions.choice(1, NUM_FEATURES, coded=True) is not None
    assert replace(tuned, decisions=Decisions()).fingerprint == a_plan(2).fingerprint
    with pytest.raises(InvalidInputError, match="expected a new file"):
        run_tune(str(plan), "--output", str(new))
    with pytest.raises(InvalidInputError, match="one of auto, tcp, torch"):
        run_tune(str(plan), "--transport", "pigeon")
