"""The machine itself, by work that is always the same: it takes longer, too, while others are at work here."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

HASHED_NBYTES = 32 << 20  # by each core: some tens of milliseconds


def machine_ms() -> float:
    """Milliseconds until all cores have done their part."""
    cores, data = os.cpu_count() or 1, bytes(HASHED_NBYTES)
    with ThreadPoolExecutor(cores) as pool:
        begun = time.perf_counter()
        list(pool.map(lambda _: hashlib.sha256(data).digest(), range(cores)))  # without the lock of Python
        return 1e3 * (time.perf_counter() - begun)
