"""The counted bytes are those that cross a network interface: a namespace's own loopback counts them too."""

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

NUM_TOKENS, NUM_FEATURES, NUM_SUMS = 512, 1024, 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40


def enter_namespace() -> None:
    """Move this process into a network namespace of its own, with a loopback interface that is up."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))


def bytes_on_loopback() -> int:
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    (loopback,) = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(loopback[8])  # transmitted


def main(folder: str) -> None:
    """In the namespace: two ranks add up, and both counts are printed."""
    try:
        enter_namespace()
    except OSError as error:
        print(json.dumps({"skip": f"no network namespace may be made here ({error.strerror})"}))
        return
    from ranks import Ranks

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    pool = Ranks(2)
    try:
        pool.run(sums, "int4-feature", 2)
        results = {}
        for preset in ("bf16", "int4-feature"):
            before = bytes_on_loopback()
            counted = sum(pool.run(sums, preset, NUM_SUMS))
            results[preset] = (counted, bytes_on_loopback() - before)
        print(json.dumps(results))
    finally:
        pool.close()


def sums(preset: str, repeats: int) -> int:
    """Bytes that this rank counted while it summed `repeats` times."""
    from models import calibrated
    from narrowcast.runtime.communicator import Communicator
    from narrowcast.runtime.sites import Sites
    from narrowcast.transport import TorchDistributedTransport

    codecs = Sites({"site": calibrated(preset, torch.ones(2, 1, NUM_FEATURES))}, (), "auto", torch.device("cpu"))
    communicator = Communicator(codecs, tp=TorchDistributedTransport(), pp=None)
    dist.barrier()
    for _ in range(repeats):
        communicator.sum([torch.ones(NUM_TOKENS, NUM_FEATURES)], "site")
    dist.barrier()
    report = codecs.report()
    assert report.num_tokens == NUM_TOKENS * repeats
    return round(report.wire_bytes_per_token * report.num_tokens)


def test_counted_bytes_are_those_of_the_interface() -> None:
    done = subprocess.run(
        [sys.executable, __file__, "."], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    if "skip" in results:
        pytest.skip(results["skip"])
    values = 2 * NUM_SUMS * NUM_TOKENS * NUM_FEATURES
    for preset, bits in (("bf16", 16), ("int4-feature", 4.1875)):
        counted, crossed = results[preset]
        assert counted * 8 / values == bits
        # TCP/IP headers and acknowledgements at loopback's MTU of 65536, and gloo's own few bytes a message.
        assert 1.0 <= crossed / counted < 1.03, (preset, counted, crossed)


if __name__ == "__main__":
    main(sys.argv[1])
