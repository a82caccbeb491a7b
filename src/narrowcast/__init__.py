"""Tensor-parallel LLM inference whose devices send each other 4 bits a value.

What is named here is imported when it is asked for: the command line answers, and can be interrupted, before PyTorch is
imported.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.attaching import attach
    from narrowcast.calibration import calibrate
    from narrowcast.codecs import PRESETS
    from narrowcast.collectives import all_gather, all_reduce, broadcast, recv, reduce_scatter, send
    from narrowcast.collectives.all_to_all import all_to_all
    from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError, PlanError
    from narrowcast.plan import Plan

# PyTorch's threads wait for one another by spinning. Where a core is busy otherwise, that is for a thread that does not
# run: as long as GNU OpenMP spins by itself, calibration takes 2.6 times as long (docs/commands.md). It is read when
# PyTorch is imported.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULES = {
    "attaching": ("attach",),
    "calibration": ("calibrate",),
    "codecs": ("PRESETS",),
    "collectives": ("all_gather", "all_reduce", "all_to_all", "broadcast", "recv", "reduce_scatter", "send"),
    "errors": ("InvalidInputError", "NarrowcastError", "PeerLostError", "PlanError"),
    "plan": ("Plan",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'narrowcast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"narrowcast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
