"""The choices of `narrowcast tune` put to the test: each against the group's own all_reduce, from 1 KB to 64 MB.

usage: python benchmarks/decisions.py [--link RATE,DELAY ...] [--codec CODEC] [--seconds S] [--json FILE]

Two ranks, on loopback and on each link (root only), over our mesh. They tune a plan as the command does, then time the
chosen way and the native sum in turns. `noise`: half the distance between the quartiles over the median, the larger of
both. A choice is right where it is not slower than native by more than 5 % or the noise.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import reporting
import torch
import torch.distributed as dist

from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import Hops, Pending, all_reduce_steps
from narrowcast.launch import Link, run
from narrowcast.perf.timing import Case, interleaved, over_ranks, rounds_within, spread
from narrowcast.perf.tune import tune
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.plan.split import Split
from narrowcast.runtime.sites import plain
from narrowcast.transport import TcpTransport

NUM_FEATURES = 4096
ROW_NBYTES = 2 * NUM_FEATURES
SIZES = [1 << exponent for exponent in range(10, 27)]


def plan_of(codec: str, num_features: int) -> Plan:
    ranges = (Ranges.of(torch.ones(sources, 1, num_features)) for sources in (2, 1))
    codecs = tuple(recipe(codec).codec(each) for each in ranges)
    return Plan(
        split=Split(tp_size=2),
        model=ModelFingerprint(config={"hidden_size": num_features}, samples={}),
        calibration={},
        sites={"sum": Site(kind="sum", codecs=codecs, error={})},
    )


def on_rank(codec: str, seconds: float) -> dict[int, Any]:
    transport, found = TcpTransport(), {}
    plans = {width: plan_of(codec, width) for width in {min(size // 2, NUM_FEATURES) for size in SIZES}}
    tuned = {width: tune(plan, transport).decisions for width, plan in plans.items()}
    for size in SIZES:
        num_features = min(size // 2, NUM_FEATURES)
        x_TE = torch.zeros(size // 2 // num_features, num_features, dtype=torch.bfloat16)
        choice = tuned[num_features].choice(len(x_TE), num_features, coded=True)
        assert choice is not None
        codecs = plans[num_features].sites["sum"].codecs
        hops = Hops(codecs) if choice.form == "coded" else plain(x_TE.dtype)

        def chosen(x=x_TE, hops=hops, choice=choice) -> object:  # type: ignore[no-untyped-def]
            if choice.form == "native":
                return transport.native_all_reduce(x)
            return Pending(all_reduce_steps(x, hops, transport, choice.algorithm, out=x), transport).wait()

        cases = {"native": Case(lambda x=x_TE: transport.native_all_reduce(x)), "chosen": Case(chosen)}  # type: ignore[misc]
        num_rounds = torch.tensor(rounds_within(seconds, cases))
        dist.broadcast(num_rounds, 0)
        found[size] = (str(choice), interleaved(cases, int(num_rounds)))
    return found


def rows(links: list[Link | None], codec: str, seconds: float) -> Iterator[dict[str, Any]]:
    for link in links:
        by_rank = run(on_rank, 2, codec, seconds, link=link)
        for size in SIZES:
            choice, _ = by_rank[0][size]
            times = {name: over_ranks([each[size][1][name] for each in by_rank]) for name in ("native", "chosen")}
            native, chosen = (statistics.median(each) for each in times.values())
            noise = max(spread(each) for each in times.values())
            yield {
                "link": None if link is None else str(link),
                "codec": codec,
                "nbytes": size,
                "choice": choice,
                "chosen_us": 1e6 * chosen,
                "native_us": 1e6 * native,
                "ratio": chosen / native,
                "noise": noise,
                "right": chosen / native <= 1 + max(0.05, noise),
            }


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--link", action="append", type=Link.parse, default=[])
    parser.add_argument("--codec", default="int4-feature")
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long for each size")
    arguments = parser.parse_args()
    table = []
    print("| link | bytes | choice | chosen us | native us | ratio | noise | right |\n" + "| --- " * 8 + "|")
    for row in rows([None, *arguments.link], arguments.codec, arguments.seconds):
        table.append(row)
        times = "{chosen_us:.0f} | {native_us:.0f} | {ratio:.2f} | {noise:.2f}".format(**row)
        print(f"| {row['link']} | {row['nbytes']} | {row['choice']} | {times} | {row['right']} |", flush=True)
    reporting.write(arguments.json, rows=table)


if __name__ == "__main__":
    main()
