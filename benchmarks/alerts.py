"""The figures that alerts look at, on ordinary text and on what a plan was not calibrated for: where thresholds belong.

usage: python benchmarks/alerts.py [--json FILE] [CODEC ...]   (of those plans alone)

The bundled model, simulated, each plan calibrated on its calibration.txt. Prompts of 256 tokens, or single tokens that
follow 64 others: of text like the calibration's, of the same in capitals, of Python, and at random; then of ordinary
text with the tokens that enter one layer's MLP 4 and 20 times as large. The largest of all sites: relative error over
the plan's, of all sums, and what one of 1000 windows of 30 and of 100 sums exceeds, also where it is visible; clipped
values over values sent, and guarded tokens over tokens, each as on one rank. Single sums' errors over the plan's, of
all sites: the lowest, the median and the highest of 100. Bits a value over the plan's.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reporting
import torch
from drift import in_capitals
from scoring import MODEL, text
from torch import Tensor, nn

import narrowcast
from narrowcast import Plan
from narrowcast.engines import load_engine
from narrowcast.monitoring.alerts import ENOUGH, PLENTY, VISIBLE
from narrowcast.plan.summary import mean_bits
from narrowcast.runtime.reports import Report

PLANS = [  # ranks, and a codec; "allocated" is what calibrate takes by itself
    *((4, "allocated"), (2, "int4-feature"), (8, "int4-feature")),
    *((4, "int8-feature"), (4, "int4-group128"), (4, "transform")),
]
LAYER, TIMES = 4, (4.0, 20.0)
NUM_SEQUENCES, NUM_PROMPTED, NUM_STEPS = 16, 64, 24
NUM_WINDOWS = 2000


def texts(tokenizer: Any) -> dict[str, list[Tensor]]:
    ordinary = text("scoring.txt", NUM_SEQUENCES)
    code = "\n".join(path.read_text() for path in sorted(Path(narrowcast.__file__).parent.glob("plan/*.py")))
    ids = tokenizer(code, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    size = (len(ordinary), 1, 256)
    return {
        "ordinary": ordinary,
        "in capitals": in_capitals(ordinary),
        "Python": [each for each in ids.split(256, dim=1) if each.shape[1] == 256][:NUM_SEQUENCES],
        "at random": list(torch.randint(5, len(tokenizer), size, generator=generator)),
    }


@contextmanager
def larger(model: Any, times: float) -> Iterator[None]:
    """The tokens that enter one MLP are so many times as large."""
    hook = model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(lambda module, given: (given[0] * times,))
    try:
        yield
    finally:
        hook.remove()


def forwards(model: Any, batches: Sequence[Tensor], traffic: str) -> Iterator[bool]:
    """Run the model, stopping after each forward; True where its sums count."""
    with torch.no_grad():
        for ids in batches if traffic == "prompts" else batches[:8]:
            if traffic == "prompts":
                model(ids, use_cache=False)
                yield True
                continue
            cache = model(ids[:, :NUM_PROMPTED], use_cache=True).past_key_values
            yield False
            for step in range(NUM_PROMPTED, NUM_PROMPTED + NUM_STEPS):
                model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
                yield True


def seen(model: Any, plan: Plan, batches: Sequence[Tensor], traffic: str) -> tuple[Report, Tensor]:
    """The report, and squares [N, S, 3] of errors, of those that the plan expects, and of sums, by forward and site."""
    totals, counted = [torch.zeros(len(plan.sites), 3, dtype=torch.float64)], []
    with narrowcast.attach(model, plan, simulate=True, sample_every=1) as handle:
        for counts in forwards(model, batches, traffic):
            counted.append(counts)
            samples = [handle.report().sites[name].samples for name in plan.sites]
            squares = [[each.noise, each.expected_noise, each.power] for each in samples if each]
            totals.append(torch.tensor(squares, dtype=torch.float64))
        return handle.report(), torch.stack(totals).diff(dim=0)[torch.tensor(counted)]


def in_windows(squares_NS3: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Errors [W, S] of as many sums, drawn at random: over the plan's, and relative."""
    generator = torch.Generator().manual_seed(1)
    drawn_WN = torch.randint(len(squares_NS3), (NUM_WINDOWS, size), generator=generator)
    noise_WS, expected_WS, power_WS = torch.stack([squares_NS3[window].sum(dim=0) for window in drawn_WN]).unbind(-1)
    return (noise_WS / expected_WS).sqrt(), (noise_WS / power_WS).sqrt()


def row(model: Any, plan: Plan, batches: Sequence[Tensor], traffic: str) -> dict[str, Any]:
    report, squares_NS3 = seen(model, plan, batches, traffic)
    sites = [report.sites[name] for name in plan.sites]
    found = {"error": in_windows(squares_NS3.sum(dim=0, keepdim=True), 1)[0].max().item()}
    ratios_NS = (squares_NS3[..., 0] / squares_NS3[..., 1]).sqrt()
    for name, share in (("lowest", 0.01), ("median", 0.5), ("highest", 0.99)):
        found[name] = ratios_NS.quantile(share).item()
    for size in (ENOUGH, PLENTY):
        ratios_WS, errors_WS = in_windows(squares_NS3, size)
        for name, each_WS in (("error", ratios_WS), ("visible", ratios_WS * (errors_WS > VISIBLE))):
            found[f"{name}_of_{size}"] = each_WS.quantile(1 - 1 / 1000, dim=0).max().item()
    # Simulated, a site counts what all ranks clip and guard, and what one of them sends.
    return {
        **found,
        "clipped": max(site.num_saturated / plan.tp_size / site.num_values for site in sites),
        "guarded": max(site.num_guarded / plan.tp_size / site.num_tokens for site in sites),
        "bits": (report.bits_per_value or 0) / (mean_bits(plan) or 1),
    }


def rows(codecs: Sequence[str]) -> Iterator[dict[str, Any]]:
    engine = load_engine()
    model: nn.Module = engine.load(MODEL, dtype="float32")
    given = texts(engine.load_tokenizer(MODEL))
    cases = [*((name, 1.0) for name in given), *(("ordinary", times) for times in TIMES)]
    for tp_size, codec in (each for each in PLANS if not codecs or each[1] in codecs):
        plan = narrowcast.calibrate(model, text("calibration.txt", 128), tp_size=tp_size, codec=codec)
        for (what, times), traffic in itertools.product(cases, ("prompts", "steps")):
            with larger(model, times):
                found = row(model, plan, given[what], traffic)
            yield {"tp_size": tp_size, "codec": codec, "text": what, "times": times, "traffic": traffic, **found}


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("codecs", nargs="*", choices=sorted({codec for _, codec in PLANS}), default=[], metavar="CODEC")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for each in rows(arguments.codecs):
        found.append(each)
        print("TP {tp_size} {codec:13} {text:11} x{times:<2g} {traffic:7}  error x{error:.2f}, of 30 x{error_of_30:.2f}"
              " ({visible_of_30:.2f}), of 100 x{error_of_100:.2f} ({visible_of_100:.2f})"
              "  single x{lowest:.2f} {median:.2f} {highest:.2f}  clipped {clipped:.2%}"
              "  guarded {guarded:.2%}  bits x{bits:.3f}".format(**each), flush=True)  # fmt: skip
    reporting.write(arguments.json, figures=found)


if __name__ == "__main__":
    main()
