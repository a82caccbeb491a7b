"""Lost ranks: every survivor ends within the deadline, with an error that names the rank."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import narrowcast
from models import random_ids, save_random
from narrowcast import InvalidInputError, PeerLostError, Plan
from narrowcast.codecs import CastCodec
from narrowcast.integrations import load_engine
from narrowcast.transport import TorchDistributedTransport, connect
from ranks import Ranks

TIMEOUT_S = 3.0


@pytest.fixture
def three() -> Iterator[Ranks]:
    """Ranks that a test may kill."""
    pool = Ranks(3)
    pool.run(int)  # all have joined
    yield pool
    pool.close()


def wait_for_all(folder: Path, count: int) -> None:
    """Return when as many ranks have left their mark in `folder`."""
    deadline = time.monotonic() + 80
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline, f"only {list(folder.iterdir())} came so far"
        time.sleep(0.05)


def sum_until_lost(marks: Path, algorithm: str, timeout_s: float) -> tuple[tuple[int, ...], float]:
    """Whom this rank misses, and how long its last sum took. A mark says that the first sum is done."""
    transport = TorchDistributedTransport(timeout_s=timeout_s)
    x = torch.ones(64, 64)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("narrowcast").addHandler(handler)
    while True:
        started = time.monotonic()
        try:
            narrowcast.all_reduce(x, codec=CastCodec(dtype=torch.float32), group=transport, algorithm=algorithm)
            (marks / f"{transport.rank}").touch()
        except PeerLostError as error:
            assert f"lost rank {error.ranks[0]} " in str(error)
            assert logged == [f"rank {transport.rank}: lost rank {error.ranks[0]} of the tensor-parallel group"]
            return error.ranks, time.monotonic() - started


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_is_named_by_every_survivor(three: Ranks, tmp_path: Path, lost: int, algorithm: str) -> None:
    three.start(sum_until_lost, tmp_path, algorithm, 60.0)
    wait_for_all(tmp_path, 3)
    os.kill(three.processes[lost].pid, signal.SIGKILL)
    for survivor in {0, 1, 2} - {lost}:
        ranks, seconds = three.result(survivor)
        assert ranks == (lost,)
        assert seconds < 50  # as it happens, before the deadline


def test_a_rank_that_hangs_is_named_after_the_deadline(three: Ranks, tmp_path: Path) -> None:
    three.start(sum_until_lost, tmp_path, "two_shot", TIMEOUT_S)
    wait_for_all(tmp_path, 3)
    os.kill(three.processes[1].pid, signal.SIGSTOP)
    try:
        for survivor in (0, 2):
            ranks, seconds = three.result(survivor)
            assert ranks == (1,)
            assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + 30
    finally:
        os.kill(three.processes[1].pid, signal.SIGCONT)


def join(port: int, rank: int, world_size: int, timeout_s: float) -> tuple[int, ...]:
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        connect(timeout_s=timeout_s)
    except PeerLostError as error:
        return error.ranks
    return ()


def join_as_rank_of_four(port: int) -> tuple[int, ...]:
    return join(port, dist.get_rank(), 4, TIMEOUT_S)


def join_but_rank_one_leaves(port: int) -> tuple[int, ...]:
    """Rank 1 answers the roll call and goes no further."""
    if dist.get_rank() == 1:
        dist.init_process_group = leave
    with contextlib.suppress(InterruptedError):
        return join(port, dist.get_rank(), 3, TIMEOUT_S)
    return ()


def leave(*_: object, **__: object) -> None:
    time.sleep(2 * TIMEOUT_S)
    raise InterruptedError


def join_then_sum(port: int, marks: Path, timeout_s: float = 60.0) -> tuple[int, ...]:
    """As torchrun's ranks do, with a store that rank 0 holds."""
    assert join(port, dist.get_rank(), 3, 60.0) == ()
    return sum_until_lost(marks, "two_shot", timeout_s)[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_that_never_comes_is_named(three: Ranks) -> None:
    assert three.run(join_as_rank_of_four, free_port()) == [(3,)] * 3


@pytest.mark.parametrize("lost", [0, 2])
def test_the_store_may_die_with_its_rank(three: Ranks, tmp_path: Path, lost: int) -> None:
    three.start(join_then_sum, free_port(), tmp_path)
    wait_for_all(tmp_path, 3)
    os.kill(three.processes[lost].pid, signal.SIGKILL)
    for survivor in {0, 1, 2} - {lost}:
        assert three.result(survivor) == (lost,)


def test_a_rank_that_hangs_with_the_store_is_named(three: Ranks, tmp_path: Path) -> None:
    """Calls of a store wait for its holder without a deadline of their own."""
    three.start(join_then_sum, free_port(), tmp_path, TIMEOUT_S)
    wait_for_all(tmp_path, 3)
    os.kill(three.processes[0].pid, signal.SIGSTOP)
    try:
        assert [three.result(survivor) for survivor in (1, 2)] == [(0,), (0,)]
    finally:
        os.kill(three.processes[0].pid, signal.SIGCONT)


def test_a_rank_lost_while_the_group_forms_is_named(three: Ranks) -> None:
    assert three.run(join_but_rank_one_leaves, free_port())[::2] == [(1,), (1,)]


def generate_until_lost(folder: Path, plan: Path, marks: Path) -> tuple[int, ...]:
    model = load_engine().load(folder, tp_size=2)
    with narrowcast.attach(model, Plan.load(plan)):
        while True:
            (marks / f"{dist.get_rank()}").touch()
            try:
                model.generate(random_ids(1, 5), max_new_tokens=100, do_sample=False)
            except PeerLostError as error:
                return error.ranks


def attach_late(folder: Path, plan: Path, late: int) -> str:
    model = load_engine().load(folder, tp_size=2)
    if dist.get_rank() == late:
        time.sleep(TIMEOUT_S + 2)
    try:
        narrowcast.attach(model, Plan.load(plan), timeout_s=TIMEOUT_S)
    except PeerLostError as error:
        return str(error)
    return "attached"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its plan for two ranks."""
    folder = save_random("llama", tmp_path_factory.mktemp("served") / "model")
    plan = folder.parent / "plan"
    narrowcast.calibrate(load_engine().load(folder), [random_ids(4, 32)], tp_size=2).save(plan)
    return folder, plan


def test_a_rank_killed_while_a_model_generates(served: tuple[Path, Path], tmp_path: Path) -> None:
    pool = Ranks(2)
    try:
        pool.start(generate_until_lost, *served, tmp_path)
        wait_for_all(tmp_path, 2)
        time.sleep(0.3)
        os.kill(pool.processes[1].pid, signal.SIGKILL)
        assert pool.result(0) == (1,)
    finally:
        pool.close()


def test_a_rank_that_does_not_attach_is_named(served: tuple[Path, Path]) -> None:
    pool = Ranks(2)
    try:
        pool.start(attach_late, *served, 1)
        assert "lost rank 1 of the tensor-parallel group while comparing plans" in pool.result(0)
    finally:
        pool.close()


def attach_another_plan(folder: Path, plans: list[Path]) -> str:
    model = load_engine().load(folder, tp_size=2)
    try:
        narrowcast.attach(model, Plan.load(plans[dist.get_rank()]))
    except InvalidInputError as error:
        narrowcast.attach(model, Plan.load(plans[0])).remove()  # the refusal left nothing behind
        return str(error)
    return "attached"


def test_ranks_with_different_plans_are_refused(
    ranks: Callable[[int], Ranks], served: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, plan = served
    other = tmp_path / "other"
    narrowcast.calibrate(load_engine().load(folder), [random_ids(4, 32, seed=9)], tp_size=2).save(other)
    for message in ranks(2).run(attach_another_plan, folder, [plan, other]):
        assert "Give every rank the same plan" in message


def test_one_rank_with_a_plan_for_another_model_stops_all(
    ranks: Callable[[int], Ranks], served: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, plan = served
    foreign_model = save_random("llama", tmp_path / "foreign", seed=5)
    foreign = tmp_path / "plan"
    narrowcast.calibrate(load_engine().load(foreign_model), [random_ids(4, 32)], tp_size=2).save(foreign)
    mine, theirs = ranks(2).run(attach_another_plan, folder, [plan, foreign])
    assert "rank 1 refused it" in mine
    assert "the weights that the plan was calibrated on" in theirs
