"""How often `baseline check` says that a server got slower: one that did not, and one that did.

usage: python benchmarks/false_alarms.py [--records N] [--scenario NAME] [--rounds N] [--restart] [--busy N] [--json F]

The bundled model's server is recorded again and again, and every record is the baseline of all that come after it. With
--restart, the server is started anew for each record; with --busy, every second one is made beside N processes that
compute all the time. Prints how many of these checks raise the alarm, by tolerance;
and, at 10 %, how many would if the later ones had taken so many times as long.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import reporting
from scoring import MODEL

from narrowcast.perf.machine import machine
from narrowcast.scorecard import Record, Scenario, Scorecard, Subject, Workload, measured, started
from narrowcast.scorecard.figures import FIGURES, SPEEDS
from narrowcast.serving import Job

TOLERANCES = 0.0, 0.02, 0.05, 0.1, 0.2
FACTORS = 1.1, 1.2, 1.5, 2.0
TEXTS = "It was the best of times.", "It was the worst of times."


BUSY = "while True: pass"


def records(workload: Workload, number: int, *, restart: bool, busy: int) -> Iterator[Record]:
    with ExitStack() as stack:
        subject: Subject | None = None
        for index in range(number):
            if subject is None or restart:
                stack.close()
                subject = stack.enter_context(started(Job(model=str(MODEL)), workload.scenario))
            with ExitStack() as others:
                for _ in range(busy * (index % 2)):
                    others.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
                found = measured(subject, workload)
            print(f"{index + 1} of {number}: {found}", flush=True)
            yield found


def slowed(record: Record, factor: float) -> Record:
    rounds = record.by_round.items()
    return replace(
        record,
        by_round={
            name: tuple(each * (factor if FIGURES[name].less_is_better else 1 / factor) for each in values)
            if name in SPEEDS
            else values
            for name, values in rounds
        },
    )


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--records", type=int, default=12)
    parser.add_argument("--scenario", default="chat")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    asked = parser.parse_args()
    workload = Workload(scenario=Scenario.load(asked.scenario), rounds=asked.rounds, texts=TEXTS)
    found = list(records(workload, asked.records, restart=asked.restart, busy=asked.busy))
    rows = []
    for tolerance, factor in (*((each, 1.0) for each in TOLERANCES), *((0.1, each) for each in FACTORS)):
        later = [slowed(each, factor) for each in found]
        pairs = itertools.combinations(range(len(found)), 2)
        worse = [Scorecard.of(found[one], later[other], tolerance=tolerance).worse for one, other in pairs]
        alarms = {name: sum(name in each for each in worse) for name in SPEEDS}
        row = {"tolerance": tolerance, "slowed": factor, "checks": len(worse), "alarms": sum(map(bool, worse))}
        rows.append({**row, **alarms})
        print(rows[-1])
    rounds = [{"record": index, **each.by_round} for index, each in enumerate(found)]
    setting = {"scenario": str(workload.scenario), "restart": asked.restart, "busy": asked.busy, "rounds": asked.rounds}
    reporting.write(asked.json, machine=machine(), **setting, rows=rows, by_round=rounds)


if __name__ == "__main__":
    main()
