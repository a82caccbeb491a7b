"""Tables that kernels look up, moved to each device once: no call waits for a host that copies."""

from typing import Generic, NamedTuple, TypeVar

import torch

Tables = TypeVar("Tables", bound=NamedTuple)


class PerDevice(Generic[Tables]):
    """A named tuple of tensors, and its copies on other devices, made when they are first asked for."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._by_device: dict[torch.device, Tables] = {}

    def on(self, device: torch.device) -> Tables:
        """The tables with all their tensors on `device`."""
        found = self._by_device.get(device)
        if found is None:
            found = self._tables._make(tensor.to(device) for tensor in self._tables)
            self._by_device[device] = found
        return found
