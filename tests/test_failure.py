"""Lost ranks: every survivor ends within the deadline, with an error that names the rank."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from models import random_ids, save_random
from narrowcast import InvalidInputError, PeerLostError, Plan
from narrowcast.codecs import CastCodec
from narrowcast.engines import load_engine
from narrowcast.launch import run
from narrowcast.launch.process import Outcome
from narrowcast.plan.split import Split
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport, Transport, connect, torch_distributed
from narrowcast.transport.torch_distributed import hurry_engine
from ranks import Ranks
from transports import GLOO, TCP, Kind, needs_mesh, over_both

TIMEOUT_S = 3.0
SILENCE_S = 1.5


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


FP32 = CastCodec(dtype=torch.float32)


def one_shot(x: Tensor, group: Transport) -> None:
    narrowcast.all_reduce(x, codec=FP32, group=group, algorithm="one_shot")


def two_shot(x: Tensor, group: Transport) -> None:
    narrowcast.all_reduce(x, codec=FP32, group=group, algorithm="two_shot")


def hierarchical(x: Tensor, group: Transport) -> None:
    """Rank 1 owns nothing: it never hears from the other node."""
    narrowcast.all_reduce(x, codec=FP32, group=group, groups=[[0, 1], [2]], algorithm="hierarchical")


def all_to_all(x: Tensor, group: Transport) -> None:
    narrowcast.all_to_all(x[:6], codec=FP32, group=group, send_counts=[2] * 3, recv_counts=[2] * 3)


def broadcast(x: Tensor, group: Transport) -> None:
    for src in range(3):
        narrowcast.broadcast(
            x, src=src, codec=FP32, num_tokens=len(x), num_features=x.shape[1], dtype=x.dtype, group=group
        )


def send_and_recv(x: Tensor, group: Transport) -> None:
    """Each to the next one, and the last one to the first."""
    sent = narrowcast.send(x, dst=(group.rank + 1) % 3, codec=FP32, group=group, async_op=True)
    narrowcast.recv(*x.shape, src=(group.rank - 1) % 3, codec=FP32, dtype=x.dtype, group=group)
    sent.wait()


def repeat_until_lost(
    marks: Path, transfer: Callable[[Tensor, Transport], None], timeout_s: float, kind: Kind = GLOO
) -> tuple[tuple[int, ...], float]:
    """Whom this rank misses, and how long its last transfer took. A mark says that the first one is done."""
    transport = kind(timeout_s=timeout_s)  # type: ignore[call-arg]
    x = torch.ones(64, 64)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("narrowcast").addHandler(handler)
    while True:
        started = time.monotonic()
        try:
            transfer(x, transport)
            (marks / f"{transport.rank}").touch()
        except PeerLostError as error:
            assert f"lost rank {error.ranks[0]} while exchanging payloads" in str(error)
            assert logged == [f"rank {transport.rank}: lost rank {error.ranks[0]}"]
            return error.ranks, time.monotonic() - started


@pytest.mark.parametrize(
    ("transfer", "lost", "kind"),
    [(transfer, lost, GLOO) for transfer in (one_shot, two_shot) for lost in range(3)]
    + [(hierarchical, 2, GLOO), (all_to_all, 1, GLOO), (broadcast, 0, GLOO), (send_and_recv, 1, GLOO)]
    + [
        pytest.param(each, lost, TCP, marks=needs_mesh) for lost, each in enumerate((two_shot, hierarchical, broadcast))
    ],
)
def test_a_killed_rank_is_named_by_every_survivor(
    three: Ranks, tmp_path: Path, lost: int, transfer: Callable[[Tensor, Transport], None], kind: Kind
) -> None:
    three.start(repeat_until_lost, tmp_path, transfer, 60.0, kind)
    wait_for_all(tmp_path, 3)
    os.kill(three.processes[lost].pid, signal.SIGKILL)
    for survivor in {0, 1, 2} - {lost}:
        ranks, seconds = three.result(survivor)
        assert ranks == (lost,)
        assert seconds < 50  # as it happens, before the deadline


def work_in_two_groups(marks: Path, port: int | None, kind: Kind) -> tuple[int, ...]:
    """Four ranks, tensor parallel in pairs, and each pair's ranks in a pipeline with those of the other."""
    if port is not None:
        assert join(port, dist.get_rank(), 4, 60.0) == ()
    rank = dist.get_rank()
    rows, columns = [dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([0, 2]), dist.new_group([1, 3])]
    row, column = kind(rows[rank // 2]), kind(columns[rank % 2])  # type: ignore[call-arg]
    x = torch.full((8, 64), float(rank))
    try:
        while True:
            assert narrowcast.all_reduce(x, codec=FP32, group=row)[0, 0] == (1 if rank < 2 else 5)
            if rank < 2:
                narrowcast.send(x, dst=1, codec=FP32, group=column)
            else:
                assert narrowcast.recv(8, 64, src=0, codec=FP32, dtype=x.dtype, group=column)[0, 0] == rank - 2
            (marks / f"{rank}").touch()
    except PeerLostError as error:
        return error.ranks


@over_both
@pytest.mark.parametrize(("lost", "held_by_rank_0"), [(3, False), (0, True)])
def test_survivors_in_every_group_name_the_lost_rank(
    tmp_path: Path, lost: int, held_by_rank_0: bool, kind: Kind
) -> None:
    """By its rank in the world, even those that share no group with it, and if the store is lost with it."""
    pool = Ranks(4)
    try:
        pool.start(work_in_two_groups, tmp_path, free_port() if held_by_rank_0 else None, kind)
        wait_for_all(tmp_path, 4)
        os.kill(pool.processes[lost].pid, signal.SIGKILL)
        assert [pool.result(survivor) for survivor in range(4) if survivor != lost] == [(lost,)] * 3
    finally:
        pool.close()


def test_a_rank_that_hangs_is_named_after_the_deadline(three: Ranks, tmp_path: Path) -> None:
    three.start(repeat_until_lost, tmp_path, two_shot, TIMEOUT_S)
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
        torch_distributed.lead_gloo = leave
    with contextlib.suppress(InterruptedError):
        return join(port, dist.get_rank(), 3, TIMEOUT_S)
    return ()


def join_without_connections(port: int) -> tuple[str, float]:
    """All ranks are there, and gloo waits for what does not come."""
    dist.init_process_group = lambda *_, **__: time.sleep(600)
    started = time.monotonic()
    with pytest.raises(InvalidInputError) as refusal:
        join(port, dist.get_rank(), 3, TIMEOUT_S)
    return str(refusal.value), time.monotonic() - started


def leave(*_: object, **__: object) -> None:
    time.sleep(2 * TIMEOUT_S)
    raise InterruptedError


def join_then_sum(port: int, marks: Path, timeout_s: float = 60.0) -> tuple[int, ...]:
    """As torchrun's ranks do, with a store that rank 0 holds."""
    assert join(port, dist.get_rank(), 3, 60.0) == ()
    return repeat_until_lost(marks, two_shot, timeout_s)[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_that_never_comes_is_named(three: Ranks) -> None:
    assert three.run(join_as_rank_of_four, free_port()) == [(3,)] * 3


def test_where_nobody_holds_the_store_its_address_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port, started = free_port(), time.monotonic()
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(PeerLostError, match=f"lost rank 0 while joining the group at 127.0.0.1:{port}"):
        connect(timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert capfd.readouterr().err == ""  # of torch's own tries


def test_a_store_that_cannot_be_held_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InvalidInputError, match=f"MASTER_PORT: expected .* a free port, found 127.0.0.1:{port}"):
            connect(timeout_s=5)


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


def test_ranks_that_cannot_connect_say_so_after_the_deadline(three: Ranks) -> None:
    for message, seconds in three.run(join_without_connections, free_port()):
        assert "expected ranks that reach each other, found that some do not; this one is on lo, 127.0.0.1" in message
        assert "Set GLOO_SOCKET_IFNAME" in message
        assert TIMEOUT_S - 0.1 < seconds < TIMEOUT_S + 20


def work_together(how: str) -> tuple[object, float]:
    """Rank 1 takes longer than others wait for one that is silent, or does not come to an end."""

    def work() -> int:
        if dist.get_rank() == 1:
            if how == "fails":
                raise ZeroDivisionError
            if how == "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "dies":
                os._exit(3)
            time.sleep(2 * SILENCE_S)
        return dist.get_rank()

    started = time.monotonic()
    try:
        found: object = TorchDistributedTransport(timeout_s=SILENCE_S).accompanied(work, "working")
    except PeerLostError as error:
        found = str(error)
    except ZeroDivisionError:
        found = "failed"
    return found, time.monotonic() - started


def test_who_works_for_long_is_waited_for(ranks: Callable[[int], Ranks]) -> None:
    results, seconds = zip(*ranks(3).run(work_together, "works"), strict=True)
    assert results == (0, 1, 2)
    assert all(each >= 2 * SILENCE_S for each in seconds)


@pytest.mark.parametrize("how", ["hangs", "dies", "fails"])
def test_who_does_not_get_done_is_named(three: Ranks, how: str) -> None:
    three.start(work_together, how)
    for survivor in (0, 2):
        message, seconds = three.result(survivor)
        assert message == "lost rank 1 while working"
        assert seconds < SILENCE_S + 20
        assert seconds >= SILENCE_S or how != "hangs"
    assert how != "fails" or three.result(1)[0] == "failed"


def meet_late(*, dies: bool) -> str:
    """Rank 1 comes later than others wait for one that is silent, or is gone before."""
    if dist.get_rank() == 1:
        time.sleep(2 * SILENCE_S)
        if dies:
            os._exit(3)
    try:
        TorchDistributedTransport(timeout_s=SILENCE_S).meet("loading")
    except PeerLostError as error:
        return str(error)
    return "met"


def test_who_comes_late_is_met(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(3).run(partial(meet_late, dies=False)) == ["met"] * 3


def test_who_dies_on_the_way_to_a_meeting_is_named(three: Ranks) -> None:
    three.start(partial(meet_late, dies=True))
    assert [three.result(survivor) for survivor in (0, 2)] == ["lost rank 1 while loading"] * 2


def sum_as_the_engine_does(marks: Path) -> None:
    hurry_engine()
    while True:
        dist.all_reduce(torch.ones(64))
        (marks / f"{dist.get_rank()}").touch()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_in_a_wait_of_the_engine_is_named(tmp_path: Path, how: signal.Signals) -> None:
    pool = Ranks(3, timeout_s=TIMEOUT_S)
    try:
        pool.start(sum_as_the_engine_does, tmp_path)
        wait_for_all(tmp_path, 3)
        started = time.monotonic()
        os.kill(pool.processes[1].pid, how)
        for survivor in (0, 2):
            outcome, error = pool.answer(survivor)
            assert (outcome, error.ranks) == (Outcome.MISSED, (1,))
        assert time.monotonic() - started < TIMEOUT_S + 20
    finally:
        pool.close()


def default_patience() -> float:
    return TorchDistributedTransport().timeout_s


def test_ranks_wait_as_long_as_they_were_started_with() -> None:
    assert run(default_patience, 2, timeout_s=7.5) == [7.5, 7.5]
    assert run(default_patience, 2) == [DEFAULT_TIMEOUT_S] * 2


def share_in_a_group() -> tuple[int, ...]:
    """Rank 2, which is rank 1 of the group, does not come."""
    group = dist.new_group([1, 2])
    try:
        if dist.get_rank() == 1:
            TorchDistributedTransport(group, timeout_s=1.0).share("", "agreeing")
    except PeerLostError as error:
        return error.ranks
    return ()


def test_a_rank_that_does_not_agree_is_named_as_in_the_world(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(3).run(share_in_a_group) == [(), (2,), ()]


def generate_until_lost(
    folder: Path, plan: Path, marks: Path, length: int = 5, max_new_tokens: int = 100
) -> tuple[int, ...]:
    loaded = Plan.load(plan)
    model = load_engine().load(folder, split=loaded.split)
    with narrowcast.attach(model, loaded, timeout_s=20.0, prompt_chunks=2):
        while True:
            (marks / f"{dist.get_rank()}").touch()
            try:
                model.generate(random_ids(1, length), max_new_tokens=max_new_tokens, do_sample=False)
            except PeerLostError as error:
                return error.ranks


def attach_late(folder: Path, plan: Path, late: int) -> str:
    model = load_engine().load(folder, split=Split(tp_size=2))
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


@pytest.mark.parametrize(("length", "max_new_tokens"), [(5, 100), (100, 1)], ids=["decoding", "prompts in turns"])
def test_a_rank_killed_while_a_model_generates(
    served: tuple[Path, Path], tmp_path: Path, length: int, max_new_tokens: int
) -> None:
    pool = Ranks(2)
    try:
        pool.start(generate_until_lost, *served, tmp_path, length, max_new_tokens)
        wait_for_all(tmp_path, 2)
        time.sleep(0.3)
        os.kill(pool.processes[1].pid, signal.SIGKILL)
        assert pool.result(0) == (1,)
    finally:
        pool.close()


@pytest.mark.parametrize("lost", [0, 3])
def test_a_rank_killed_in_a_pipeline_of_split_layers(tmp_path: Path, lost: int) -> None:
    """Every rank shares layers with one other and passes hidden states to or from another: all name the lost one."""
    folder, plan = save_random("mixtral", tmp_path / "model"), tmp_path / "plan"
    whole = load_engine().load(folder)
    narrowcast.calibrate(whole, [random_ids(4, 32)], tp_size=2, pp_size=2).save(plan)
    marks = tmp_path / "marks"
    marks.mkdir()
    pool = Ranks(4)
    try:
        pool.start(generate_until_lost, folder, plan, marks)
        wait_for_all(marks, 4)
        time.sleep(0.5)
        os.kill(pool.processes[lost].pid, signal.SIGKILL)
        assert [pool.result(rank) for rank in range(4) if rank != lost] == [(lost,)] * 3
    finally:
        pool.close()


def test_a_rank_that_does_not_attach_is_named(served: tuple[Path, Path]) -> None:
    pool = Ranks(2)
    try:
        pool.start(attach_late, *served, 1)
        assert "lost rank 1 while choosing a transport" in pool.result(0)
    finally:
        pool.close()


def attach_another_plan(folder: Path, plans: list[Path]) -> str:
    model = load_engine().load(folder, split=Split(tp_size=2))
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
