"""Small sums of a plan in one native call and by steps, beside the exchange of as many bytes over plain sockets.

usage: python benchmarks/small_sums.py [--codec CODEC ...] [--tp N] [--json FILE]

Ranks on loopback, tensors of 4 to 64 KB in BF16, with depth feedback; back to back in turns, medians of what rank 0
takes. With more ranks than cores they wait for a core, too.
"""

import statistics
import time
from functools import partial
from typing import Any

import reporting
import torch
import torch.distributed as dist

from narrowcast.codecs import Ranges, recipe
from narrowcast.launch import run
from narrowcast.perf.machine import machine
from narrowcast.perf.sockets import SocketMesh
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.small_sums import SmallSums
from narrowcast.transport import TcpTransport

NUM_FEATURES, TOKENS = 2048, (1, 4, 16)
ROUNDS, WARM_UP = 2000, 200


def on_rank(codec: str, num_tokens: int, algorithm: str) -> dict[str, Any]:
    transport, mesh = TcpTransport(), SocketMesh()
    shape = num_tokens, NUM_FEATURES
    x_RTE = torch.randn(transport.world_size, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    codecs = recipe(codec).codec(Ranges.of(x_RTE)), recipe(codec).codec(Ranges.of(x_RTE.float().sum(0, True)))
    residue, x_TE = torch.zeros(3, *shape), x_RTE[transport.rank]

    def sums() -> Communicator:
        return Communicator(Sites({"s": codecs}, (), algorithm, x_TE.device), tp=transport, pp=None)

    in_one_call, by_steps = sums(), sums()
    by_steps._small_sums.take = lambda y_TE: False  # type: ignore[method-assign]
    in_one_call.sum([x_TE], "s", residue)
    sent = in_one_call.sites.report().sites["s"].wire_bytes // (transport.world_size - 1)
    cases = {
        "one_call_us": partial(in_one_call.sum, [x_TE], "s", residue),
        "steps_us": partial(by_steps.sum, [x_TE], "s", residue),
        "socket_us": partial(mesh.exchange, sent),
    }
    medians = {}
    for name, case in cases.items():
        dist.barrier()
        taken = []
        for _ in range(ROUNDS + WARM_UP):
            start = time.perf_counter()
            case()
            taken.append(time.perf_counter() - start)
        medians[name] = statistics.median(taken[WARM_UP:]) * 1e6
    mesh.close()
    assert isinstance(in_one_call._small_sums, SmallSums) and all(in_one_call._small_sums._calls.values())
    return {"bytes_to_each": sent, **medians}


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--codec", nargs="+", default=["bf16", "int4-feature"])
    parser.add_argument("--tp", type=int, default=2)
    asked = parser.parse_args()
    rows = []
    for num_tokens in TOKENS:
        for codec in asked.codec:
            for algorithm in "one_shot", "two_shot":
                found = run(on_rank, asked.tp, codec, num_tokens, algorithm)[0]
                setting = {"codec": codec, "algorithm": algorithm, "nbytes": num_tokens * NUM_FEATURES * 2}
                rows.append({**setting, **found, "ratio": found["one_call_us"] / found["socket_us"]})
                print(*(f"{each:.4g}" if isinstance(each, float) else each for each in rows[-1].values()), flush=True)
    reporting.write(asked.json, machine=machine(), tp_size=asked.tp, rows=rows)


if __name__ == "__main__":
    main()
