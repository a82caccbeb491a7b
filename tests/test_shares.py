"""One machine beside a plan's ranks: its model's products, whole and shared out, whatever they take."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import run
from models import random_ids, save_random
from narrowcast import Plan, calibrate
from narrowcast.cli.tune import against_one_machine
from narrowcast.codecs.kernels import cpu
from narrowcast.engines import Weights, load_engine
from narrowcast.launch.alone import alone, cores_of_host, with_cores
from narrowcast.perf.shares import Layers, Timed, one_and_shares
from narrowcast.perf.tune import Timing, Tuning, sums_s
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.transport import TorchDistributedTransport
from narrowcast.weights.formats import Q4_0
from ranks import Ranks

NATIVE, ONE = Choice("native"), Choice("coded", "one_shot")
NUM_SUMS = 4  # of two layers


def plan_of(family: str, folder: Path) -> Plan:
    model = load_engine().load(save_random(family, folder))
    return calibrate(model, [random_ids(1, 8)], tp_size=2, codec="int8-group128")


@pytest.mark.parametrize("weights", ["stored", "int4-group32"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-odd", "qwen3", "phi3", "gemma2"])
def test_layers_are_those_of_the_model(family: str, weights: Weights, tmp_path: Path) -> None:
    """By the config that the plan has of it, as many bytes as its matrices; fused ones may fill blocks otherwise."""
    layers = Layers.of(plan_of(family, tmp_path / "model"), weights, 1)
    assert layers is not None
    used = [each for each in load_engine().matrices(tmp_path / "model", weights=weights) if each.used]
    assert layers.number * layers.nbytes + layers.output_nbytes == sum(each.nbytes for each in used)


def test_a_rank_has_its_share_of_each_matrix_in_whole_groups(tmp_path: Path) -> None:
    plan = plan_of("llama", tmp_path / "model")
    whole, half, third = (Layers.of(plan, "int4-group32", number) for number in (1, 2, 3))
    assert whole is not None and half is not None and third is not None
    bf16, (hidden, inner) = torch.bfloat16, (96, 140)  # 140 columns are no whole groups
    assert whole.matrices == [
        (Q4_0, (3 * hidden, hidden)),
        (Q4_0, (2 * inner, hidden)),
        (Q4_0, (hidden, hidden)),
        (bf16, (hidden, inner)),
    ]
    assert half.matrices == [
        (Q4_0, (3 * hidden // 2, hidden)),
        (Q4_0, (inner, hidden)),
        (Q4_0, (hidden, 64)),
        (bf16, (hidden, inner // 2)),
    ]
    assert [shape for _, shape in third.matrices][2:] == [(hidden, 32), (hidden, 47)]


def test_layers_that_a_plan_does_not_tell_are_not_guessed(tmp_path: Path) -> None:
    assert Layers.of(plan_of("mixtral", tmp_path / "experts"), "stored", 2) is None
    plan = plan_of("llama", tmp_path / "model")
    differing = replace(plan.model, config={**plan.model.config, "intermediate_size": [140, 160]})
    assert Layers.of(replace(plan, model=differing), "stored", 2) is None


def test_sums_of_all_layers_grow_by_token_between_two_sizes(tmp_path: Path) -> None:
    """By the best way of each size, and with the logits of one token."""
    times = {1: (1e-4, 5e-5), 256: (1e-3, 2e-3), 1024: (4e-3, 9e-3)}
    timings = [
        Timing(num_tokens=num_tokens, nbytes=1, seconds={NATIVE: native, ONE: one}, measured=True)
        for num_tokens, (native, one) in times.items()
    ]
    tuning = Tuning(decisions=Decisions(logits_s=1e-3), timings=timings)
    plan = plan_of("llama", tmp_path / "model")
    assert sums_s(plan, tuning, 1) == pytest.approx(NUM_SUMS * 5e-5 + 1e-3)
    assert sums_s(plan, tuning, 512) == pytest.approx(NUM_SUMS * 2e-3 + 1e-3)


def cores_while_alone() -> tuple[int | None, int, int]:
    """Of the first rank alone; then its own again."""
    with with_cores(7):
        threads = torch.get_num_threads()

    def cores() -> int:
        with with_cores(cores_of_host()):
            return cpu.cores_of_this_rank()

    return alone(TorchDistributedTransport(), cores, "trying"), threads, cpu.cores_of_this_rank()


def test_the_first_rank_alone_has_all_cores_of_its_machine(ranks: Callable[[int], Ranks]) -> None:
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // 2)
    assert ranks(2).run(cores_while_alone) == [(cores, 7, share), (None, 7, share)]


def timed(plan: bytes, weights: Weights) -> tuple[list[Timed], int]:
    found = one_and_shares(Plan.from_bytes(plan, "memory"), TorchDistributedTransport(), weights, (0.5, 0.25))
    return found, torch.get_num_threads()


@pytest.mark.parametrize("weights", ["stored", "int4-group32"])
def test_one_machine_and_the_slowest_rank_are_timed(
    ranks: Callable[[int], Ranks], weights: Weights, tmp_path: Path
) -> None:
    plan = plan_of("llama", tmp_path / "model")
    (first, own), (second, _) = ranks(2).run(timed, plan.to_bytes(), weights)
    *ones, both = first
    assert [each.machines for each in ones] == [1] * len(ones)
    assert [each.cores for each in ones] == sorted({os.cpu_count(), own}, reverse=True)
    assert second[-1] == both and (both.machines, both.cores, len(second)) == (2, own, 1)
    assert all(min(each.prompt_s, each.token_s) > 0 for each in first)
    assert both.answer_ms == pytest.approx((1e3 * both.prompt_s + 500, 1e3 * both.token_s + 250))
    assert all(each.prompt_sums_s == each.token_sums_s == 0 for each in ones)


def test_ranks_that_gain_nothing_over_one_machine_are_told() -> None:
    """A machine of all cores, and one of a rank's."""
    ranks = Timed(machines=2, cores=1, prompt_s=0.05, token_s=0.005, prompt_sums_s=0.03, token_sums_s=0.007)
    all_cores = Timed(machines=1, cores=2, prompt_s=0.05, token_s=0.005)
    one_core = replace(all_cores, cores=1, prompt_s=0.1, token_s=0.01)
    assert list(against_one_machine([all_cores, one_core], ranks)) == [
        "Than one machine of 2 cores, 2 ranks of 1 core each are slower for a prompt (80 ms, not 50) and slower for a "
        "token after it (12 ms, not 5).",
        "Than one machine of 1 core, 2 ranks of 1 core each are slower for a token after it (12 ms, not 10).",
        "Ranks share this machine's 2 cores, which ranks with a machine each would not.",
    ]
    assert not list(against_one_machine([replace(one_core, token_s=0.1)], ranks))


def test_the_command_shows_one_machine_beside_the_ranks(tmp_path: Path) -> None:
    plan_of("llama", tmp_path / "model").save(tmp_path / "plan")
    shown = run("tune", tmp_path / "plan", "--weights", "int4-group32")
    assert "a prompt of 512, a token after it, weights int4-group32" in " ".join(shown.split())
    rows = [line for line in shown.splitlines() if line.startswith((" one machine", " 2 ranks"))]
    assert len(rows) >= 2 and "one after the other: " in " ".join(shown.split())
