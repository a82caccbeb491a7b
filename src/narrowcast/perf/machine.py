"""The machine that figures were measured on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """The processor's name and the number of its cores."""
    try:
        found = re.search(r"^model name\s*: (.*)$", CPU_INFO.read_text(encoding="utf8"), re.MULTILINE)
    except OSError:
        found = None
    return {"cpu": found[1] if found else platform.machine(), "cores": os.cpu_count()}


def gpus() -> list[str]:
    """Their names."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
