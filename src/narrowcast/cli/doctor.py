"""`narrowcast doctor`: what is installed here and what can run."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from narrowcast.cli import options, preflight
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import screen, table
from narrowcast.codecs import kernels
from narrowcast.engines import computes_bf16
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, versions, write_report
from narrowcast.launch import become_rank, emulation, is_first_rank, under_torchrun
from narrowcast.perf.machine import gpus
from narrowcast.preflight import Roll, examined, problems
from narrowcast.transport import DEFAULT_TIMEOUT_S
from narrowcast.transport.tcp import COMPILED


def doctor(
    hosts: Annotated[
        str | None, typer.Option(metavar="HOST,HOST", help="Of each rank, rank 0's first: names or addresses.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(metavar="K", help="Which of the hosts this one is, from 0.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan that all ranks should have.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A model that all ranks should have.")] = None,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: options.JsonOption = None,
) -> None:
    """Show versions, devices, kernels and transports; or whether several machines can work together.

    For that, run it under torchrun, or with --hosts at the same time on each of them. All show which interface each
    binds, clocks, latencies and rates of all pairs, and a line for each problem (status 1), with its remedy.
    """
    others = {"--node-rank": node_rank, "--plan": plan, "--model": model, "--json": json}
    if hosts is not None:
        names = _checked(hosts, node_rank)
        become_rank(node_rank or 0, names)
    elif under_torchrun() and node_rank is None:
        names = ()
    elif given := [option for option, value in others.items() if value is not None]:
        raise InvalidInputError(
            given[0], expected="several ranks", found="this process alone", remedy="Pass --hosts, or start torchrun."
        )
    else:
        _show_this_machine()
        return
    shows = hosts is not None or is_first_rank()
    if shows:
        check_report(json)
    with shown():
        roll = Roll(names, timeout_s=timeout)
        report = examined(roll, plan=plan, model=model)
    found = problems(report)
    if shows:
        preflight.show(report, found)
    if shows and json is not None:
        write_report(json, {**report.to_json(), "problems": [asdict(each) for each in found]})
    roll.close()
    if found:
        raise typer.Exit(1)


def _checked(hosts: str, node_rank: int | None) -> tuple[str, ...]:
    """The hosts, one for each rank, of which this one is one."""
    names = tuple(name.strip() for name in hosts.split(","))
    if under_torchrun():
        raise InvalidInputError(
            "--hosts", expected="a doctor alone", found="torchrun's", remedy="Leave one of them out."
        )
    if len(names) < 2 or not all(names):
        raise InvalidInputError(
            "--hosts", expected="two or more, with commas", found=repr(hosts), remedy="Pass 10.0.0.1,10.0.0.2, say."
        )
    if node_rank is None or not 0 <= node_rank < len(names):
        raise InvalidInputError(
            "--node-rank",
            expected=f"the place of this host among --hosts, 0 to {len(names) - 1}",
            found="none" if node_rank is None else node_rank,
            remedy="Pass 0 on the first one, 1 on the second one.",
        )
    return names


def _show_this_machine() -> None:
    found = table("narrowcast doctor", ("what", "found"))
    for package, version in versions().items():
        found.add_row(package, version or "[yellow]not installed[/]")
    found.add_section()
    threads = torch.get_num_threads()
    found.add_row("cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    if crowded := _crowded(threads):
        found.add_row("", crowded)
    if not computes_bf16():
        found.add_row("", "[yellow]no BF16 arithmetic[/]: with --dtype float32, BF16 models run several times faster")
    found.add_row("cuda", ", ".join(gpus()) or "none")
    found.add_section()
    found.add_row("kernels on cpu", _cpu_kernels())
    if gpus():
        found.add_row("kernels on cuda", "reference (plain PyTorch)")
    found.add_section()
    for backend, available in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        found.add_row(f"transport torch.distributed, {backend}", "available" if available else "not in this PyTorch")
    found.add_row("transport tcp", "available" if COMPILED else "needs the compiled module")
    found.add_row("emulated links, for benchmarks", _emulated_links())
    screen().print(found)


def _crowded(num_threads: int) -> str:
    """A warning where PyTorch's threads are more than the cores that nobody else keeps busy; "" for none."""
    cores, busy = os.cpu_count() or 1, round(os.getloadavg()[0])
    free = max(1, cores - busy)
    if num_threads <= free:
        return ""
    return (
        f"[yellow]{busy} of {cores} cores are busy[/], and {num_threads} threads of PyTorch wait for each other: with "
        f"OMP_NUM_THREADS={free} they compute faster"
    )


def _cpu_kernels() -> str:
    selected, others = kernels.selected(), kernels.available()[:-1]
    if selected == kernels.REFERENCE:
        return (
            "[yellow]reference (plain PyTorch)[/]: the compiled module is missing, and coding takes many times as long."
            " Install a C++ compiler and CMake (apt install g++ cmake), then install narrowcast again, with pip's -v to"
            " see why a build fails."
        )
    return f"{selected} (C++); also {', '.join(reversed(others))}"


def _emulated_links() -> str:
    try:
        emulation.check_possible(2)
    except InvalidInputError as error:
        return str(error)
    return "available"
