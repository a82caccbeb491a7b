"""Tensor-parallel LLM inference whose devices send each other 4 bits a value."""

import os
import sys

# PyTorch's threads wait for one another by spinning. Where a core is busy otherwise, that is for a thread that does not
# run: as long as GNU OpenMP spins by itself, calibration takes 2.6 times as long (docs/commands.md). It is read when
# PyTorch is imported.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from narrowcast.attach import attach
from narrowcast.calibration import calibrate
from narrowcast.codecs import PRESETS
from narrowcast.collectives import all_gather, all_reduce, all_to_all, broadcast, recv, reduce_scatter, send
from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError, PlanError
from narrowcast.plan import Plan

__all__ = [
    "PRESETS",
    "InvalidInputError",
    "NarrowcastError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attach",
    "broadcast",
    "calibrate",
    "recv",
    "reduce_scatter",
    "send",
]
