"""`narrowcast doctor`: what is installed here and what can run."""

import os

import torch
import torch.distributed as dist

from narrowcast.cli.tables import screen, table
from narrowcast.codecs import kernels
from narrowcast.engines import computes_bf16
from narrowcast.errors import InvalidInputError
from narrowcast.files import versions
from narrowcast.launch import emulation
from narrowcast.transport.tcp import COMPILED


def doctor() -> None:
    """Show versions, devices, kernels and transports."""
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
    found.add_row("cuda", ", ".join(_gpus()) or "none")
    found.add_section()
    found.add_row("kernels on cpu", _cpu_kernels())
    if _gpus():
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


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
