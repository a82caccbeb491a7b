"""Agreement on codecs: payloads of other ones, where they are as long, would add up to garbage without an error."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Exchange, Steps, without
from narrowcast.collectives.pending import Pending
from narrowcast.errors import InvalidInputError
from narrowcast.transport import Transport


def agree(codecs: Sequence[Codec], transport: Transport, device: torch.device) -> None:
    """InvalidInputError on every rank unless all pass the same codecs. They compare them when they first use them."""
    digest = digest_of(codecs)
    if transport.world_size > 1 and digest not in transport.collectives.agreed:
        Pending(_steps(digest, codecs, transport, device), transport).wait()
        transport.collectives.agreed.add(digest)


def digest_of(codecs: Sequence[Codec]) -> bytes:
    """SHA-256 of all that makes these codecs."""
    found = hashlib.sha256()
    for codec in codecs:
        config, tensors = codec.state()
        found.update(f"{codec.id} {json.dumps(config)}".encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def _steps(digest: bytes, codecs: Sequence[Codec], transport: Transport, device: torch.device) -> Steps:
    rank, world_size = transport.rank, transport.world_size
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    every: Tensor = own.expand(world_size, -1).contiguous()
    yield Exchange(without([own] * world_size, rank), without(every.unbind(), rank), 0)
    if differing := [peer for peer, theirs in enumerate(every) if not torch.equal(theirs, own)]:
        raise InvalidInputError(
            f"codec of rank {differing[0]}",
            expected=f"that of rank {rank}, {' and '.join(codec.id for codec in codecs)}, with the same tensors",
            found="another one",
            remedy="Pass the same codecs on every rank, as a plan file does.",
        )
    return own
