"""The link emulator, compiled (csrc/bindings/emulator.cpp): for benchmarks and tests."""

def enter_namespace(address: str, mtu: int) -> int:
    """Move the calling thread into a network namespace of its own; the descriptor of its TUN device."""

def carry(devices: list[int], rate_bps: float, delay_s: float, queue_bytes: int) -> None:
    """Carry packets between TUN devices, rank 0's first, as links of that rate and delay do; never returns."""
