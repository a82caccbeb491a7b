"""The worth of the guard of `feature`: on ordinary text, on text unlike the calibration's, and on planted values.

usage: python benchmarks/drift.py [--json FILE]

The bundled model at TP 8, simulated, calibrated on its calibration.txt, scored on its scoring.txt and on the same in
capital letters: KL in nats from the uncompressed model with its standard error over sequences, with the guard and
without it. Then the relative error of features that are no outliers, in random tokens of which some features are up to
100 times as large as calibration saw them, or which are 4 times as large as a whole; with outlier features that are 1,
20 and 400 times as large as others.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import reporting
import torch
from scoring import MODEL, text
from torch import Tensor, nn

import narrowcast
from narrowcast import Plan
from narrowcast.codecs import Codec, Ranges, feature, recipe
from narrowcast.engines import load_engine
from narrowcast.scores import compare, log_probs

NUM_FEATURES = 512
FAR = {"none": 0, "one, 100 times": 1, "10 %, 100 times": NUM_FEATURES // 10, "all, 100 times": NUM_FEATURES}
LARGER = "token, 4 times"


def guarded(on: bool) -> AbstractContextManager[Any]:
    """Codecs made and used inside have a guard, or none."""
    return nullcontext() if on else mock.patch.object(feature, "guard_for", lambda *_: None)


def in_capitals(ids: Sequence[Tensor]) -> list[Tensor]:
    tokenizer = load_engine().load_tokenizer(MODEL)
    texts = [tokenizer.decode(each[0], skip_special_tokens=True).upper() for each in ids]
    return [tokenizer(each, return_tensors="pt").input_ids[:, :256] for each in texts]


def rows_of_text(model: nn.Module) -> Iterator[dict[str, Any]]:
    ordinary = text("scoring.txt", 32)
    texts = {"ordinary": ordinary, "in capitals": in_capitals(ordinary)}
    references = {name: [log_probs(model, ids) for ids in batches] for name, batches in texts.items()}
    for codec in ("int4-feature", "int6-feature", "int8-feature"):
        made = narrowcast.calibrate(model, text("calibration.txt", 128), tp_size=8, codec=codec).to_bytes()
        for (name, batches), algorithm, on in itertools.product(texts.items(), ("one_shot", "two_shot"), (False, True)):
            with guarded(on):
                plan = Plan.from_bytes(made, "plan")  # its codecs have not been used yet
                with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
                    found = [log_probs(model, ids) for ids in batches]
                    report = handle.report()
            scores = zip(references[name], found, batches, strict=True)
            kl = [compare([expected], [answer], [ids]).kl_nats for expected, answer, ids in scores]
            num_codings = report.num_tokens * len(report.sites) * (8 + (algorithm == "two_shot"))
            yield {
                "text": name,
                "codec": codec,
                "algorithm": algorithm,
                "guard": on,
                "kl_nats": statistics.mean(kl),
                "standard_error": statistics.stdev(kl) / len(kl) ** 0.5,
                "guarded": report.num_guarded / num_codings,
                "saturated": report.num_saturated,
            }


def planted(codec: feature.FeatureCodec, spread_E: Tensor, what: str) -> Tensor:
    """Tokens [200, E], of whose features, no outliers, some are 50 to 100 times as large as was calibrated."""
    generator = torch.Generator().manual_seed(1)
    x_TE = torch.randn(200, NUM_FEATURES, generator=generator) * spread_E
    if what == LARGER:
        return 4 * x_TE
    reach_E = codec.scale[0].float() * (2 ** (codec.num_bits - 1) - 1)
    for x_E in x_TE:
        order = torch.randperm(NUM_FEATURES, generator=generator)
        far = order[~torch.isin(order, codec.outliers)][: FAR[what]]
        x_E[far] = x_E[far].sign() * reach_E[far] * 50 * (1 + torch.rand(len(far), generator=generator))
    return x_TE


def relative_error(codec: Codec, x_TE: Tensor, which_E: Tensor) -> float:
    error_TE = codec.decode(codec.encode(x_TE, source=0), source=0) - x_TE
    return (error_TE[:, which_E].square().mean() / x_TE[:, which_E].square().mean()).sqrt().item()


def rows_of_planted() -> Iterator[dict[str, Any]]:
    for name, times in itertools.product(("feature(bits=2)", "int4-feature", "int8-feature"), (1, 20, 400)):
        generator = torch.Generator().manual_seed(0)
        spread_E = torch.ones(NUM_FEATURES)
        spread_E[torch.randperm(NUM_FEATURES, generator=generator)[:8]] = times
        ranges = Ranges.of(torch.randn(1, 400, NUM_FEATURES, generator=generator) * spread_E)
        for what, on in itertools.product((*FAR, LARGER), (False, True)):
            with guarded(on):
                codec = recipe(name).codec(ranges)
                which_E = torch.ones(NUM_FEATURES, dtype=torch.bool).index_fill_(0, codec.outliers, False)
                error = relative_error(codec, planted(codec, spread_E, what), which_E)
            yield {"codec": name, "outliers_times": times, "far": what, "guard": on, "relative_error": error}


def main() -> None:
    arguments = reporting.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    texts, values = [], []
    for row in rows_of_text(load_engine().load(MODEL)):
        texts.append(row)
        print("{text:11} {codec:12} {algorithm:8}  guard {guard!s:5}  KL {kl_nats:.5f} ± {standard_error:.5f}"
              "  guarded {guarded:.3%}  saturated {saturated}".format(**row), flush=True)  # fmt: skip
    for row in rows_of_planted():
        values.append(row)
        print("{codec:15} outliers x{outliers_times:<3}  far: {far:15}  guard {guard!s:5}"
              "  relative error of the others {relative_error:.4f}".format(**row), flush=True)  # fmt: skip
    reporting.write(arguments.json, text=texts, planted=values)


if __name__ == "__main__":
    main()
