"""The choice of a group's transport, the same on all its ranks."""

import json
import logging
from typing import NamedTuple

import torch
import torch.distributed as dist

from narrowcast.errors import InvalidInputError
from narrowcast.transport.base import Transport
from narrowcast.transport.group import GroupTransport
from narrowcast.transport.tcp import COMPILED, TcpTransport
from narrowcast.transport.torch_distributed import TorchDistributedTransport

TRANSPORTS = ("auto", "tcp", "torch")

logger = logging.getLogger(__name__)


class Groups(NamedTuple):
    """The process groups of a split model: the ranks that share this rank's layers, and those of its pipeline."""

    tp: torch.distributed.ProcessGroup | None
    pp: torch.distributed.ProcessGroup | None


def connect_group(
    group: dist.ProcessGroup | None,
    *,
    transport: str = "auto",
    device: torch.device,
    timeout_s: float | None = None,
) -> GroupTransport:
    """A transport between the ranks of `group`, whose models compute on `device`; all of them call this.

    `transport`: "tcp", our own mesh of connections; "torch", whatever torch.distributed does; "auto", the mesh for
    models on the CPU where every rank can have it. InvalidInputError, on every rank, if they ask for different ones, or
    for "tcp" where one of them cannot.
    """
    check_transport(transport)
    plain = TorchDistributedTransport(group, timeout_s=timeout_s)
    mine = {"asked": transport, "lacks": _lacking(device)}
    cards = [json.loads(text) for text in plain.share(json.dumps(mine), "choosing a transport")]
    for rank, card in enumerate(cards):
        if card["asked"] != cards[0]["asked"]:
            raise InvalidInputError(
                f"transport of rank {rank}",
                expected=f"that of rank 0, {cards[0]['asked']!r}",
                found=repr(card["asked"]),
                remedy="Give every rank the same options.",
            )
    lacking = [f"rank {rank} lacks {card['lacks']}" for rank, card in enumerate(cards) if card["lacks"] is not None]
    if transport == "torch" or (transport == "auto" and lacking):
        return plain
    if lacking:
        raise InvalidInputError(
            "transport",
            expected="ranks that can all take 'tcp'",
            found="; ".join(lacking),
            remedy="Provide that, or take another transport: auto, or torch.",
        )
    try:
        return TcpTransport(group, timeout_s=timeout_s)
    except InvalidInputError as error:  # the same on all ranks
        if transport == "tcp":
            raise
        logger.warning("no TCP mesh, torch.distributed instead: %s", error)
        return plain


def transports_of(
    groups: Groups,
    *,
    transport: str = "torch",
    device: torch.device = torch.device("cpu"),
    timeout_s: float | None = None,
) -> tuple[Transport | None, Transport | None]:
    """Transports between the ranks that share layers, and between the stages of a pipeline; `attach` says which."""
    tp, pp = (
        None if group is None else connect_group(group, transport=transport, device=device, timeout_s=timeout_s)
        for group in groups
    )
    return tp, pp


def check_transport(transport: str) -> None:
    """InvalidInputError unless there is such a transport."""
    if transport not in TRANSPORTS:
        raise InvalidInputError(
            "transport",
            expected=f"one of {', '.join(TRANSPORTS)}",
            found=repr(transport),
            remedy="Choose one of these.",
        )


def _lacking(device: torch.device) -> str | None:
    if not COMPILED:
        return "the compiled module (narrowcast doctor says why)"
    return None if device.type == "cpu" else "a model on the CPU"
