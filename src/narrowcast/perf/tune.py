"""Measuring, on the ranks of a plan, which way is fastest for which size of a sum."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast.codecs import TransformCodec
from narrowcast.collectives import Hops, Pending, deferred_all_reduce_steps
from narrowcast.collectives.algorithms import ALGORITHMS, NODE_ALGORITHMS
from narrowcast.collectives.base import Deferred
from narrowcast.collectives.gather import all_gather_features_steps
from narrowcast.engines import Weights
from narrowcast.errors import InvalidInputError
from narrowcast.launch import run
from narrowcast.perf.shares import PROMPT_TOKENS, Timed, one_and_shares
from narrowcast.perf.timing import Case, interleaved, seconds
from narrowcast.plan import Plan, Site
from narrowcast.plan.decisions import FORMS, Choice, Decisions, Thresholds
from narrowcast.progress import Progress, tell
from narrowcast.runtime import feedback
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.sites import plain as uncoded
from narrowcast.transport import (
    DEFAULT_TIMEOUT_S,
    TorchDistributedTransport,
    Transport,
    check_transport,
    connect_group,
)
from narrowcast.transport.torch_distributed import hurry_engine
from narrowcast.weights.products import multiply_dense

LARGEST_NBYTES = 64 << 20  # of a tensor; larger ones go the same way
GAIN = 0.95  # a coded sum costs accuracy: it must take no more than this share of an uncompressed one's time
GROWTH = 4  # from one size to the next
MIN_ROUNDS, MAX_ROUNDS = 5, 25
FEW_TOKENS = 16
FEW_AND_MANY = 1, GROWTH**4


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median seconds of a sum by each way; not `measured` but extrapolated where measuring would take too long.

    `waiting_s`: of the best way, those in which the rank's thread computes nothing.
    """

    num_tokens: int
    nbytes: int  # of the tensor
    seconds: Mapping[Choice, float]
    measured: bool
    waiting_s: float = 0.0

    def best(self, forms: Sequence[str]) -> Choice:
        """The fastest way of `forms`, a coded one only where it gains enough."""
        allowed = [choice for choice in self.seconds if choice.form in forms]
        return min(allowed, key=lambda choice: self.seconds[choice] / (GAIN if choice.form == "coded" else 1))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The decisions, and the timings from which they follow, by ascending size."""

    decisions: Decisions
    timings: Sequence[Timing]


@dataclass(frozen=True, kw_only=True)
class Way:
    """The way of a plan's sums of some number of tokens.

    `seconds`: of one sum, None where they were not measured; `nbytes`: what the first rank sends of all of them.
    """

    choice: Choice
    seconds: float | None
    nbytes: int


def sums_s(plan: Plan, tuning: Tuning, num_tokens: int) -> float:
    """Seconds of all sums of so many tokens by their best way, one after the other, and of the last token's logits.

    Between two sizes they grow by token.
    """
    number = sum(site.kind == "sum" for site in plan.sites.values())
    sizes = [timing.num_tokens for timing in tuning.timings]
    taken = [timing.seconds[timing.best(FORMS)] for timing in tuning.timings]
    return number * float(np.interp(num_tokens, sizes, taken)) + tuning.decisions.logits_s


def changes(plan: Plan, tuning: Tuning) -> dict[int, tuple[Way, Way]]:
    """The ways of `plan` before and after tuning, by number of tokens: of one token, and of a prompt."""
    before, after = (_sites(plan, decisions) for decisions in (plan.decisions, tuning.decisions))
    timings = [timing for timing in tuning.timings if timing.num_tokens in FEW_AND_MANY]
    return {timing.num_tokens: (_way(plan, before, timing), _way(plan, after, timing)) for timing in timings}


def _sites(plan: Plan, decisions: Decisions) -> Sites:
    sums = {name: site.codecs for name, site in plan.sites.items() if site.kind == "sum"}
    return Sites(sums, plan.groups, "auto", torch.device("cpu"), decisions=decisions)


def _way(plan: Plan, sites: Sites, timing: Timing) -> Way:
    """Of the site that stands for all, and the bytes of each."""
    shape, nbytes, ways = (timing.num_tokens, int(plan.model.config["hidden_size"])), 0, {}
    for name, site in plan.sites.items():
        if site.kind == "sum":
            ways[name] = sites.choice(name, *shape, plan.tp_size)
            nbytes += sites.traffic(name, ways[name], shape, torch.bfloat16, 0, plan.tp_size).nbytes
    typical = _site_of_sums(plan)
    choice = next(ways[name] for name, site in plan.sites.items() if site is typical)
    return Way(choice=choice, seconds=timing.seconds.get(choice), nbytes=nbytes)


def tune(plan: Plan, transport: Transport, *, dtype: torch.dtype = torch.bfloat16, budget_s: float = 1.0) -> Tuning:
    """Time the sums of `plan` for about `budget_s` seconds. All ranks call this, and return what rank 0 measured.

    Raises InvalidInputError for a plan of another number of ranks or without sums, PeerLostError for a lost rank.
    """
    if transport.world_size != plan.tp_size:
        raise InvalidInputError(
            "tune", expected=f"{plan.tp_size} ranks, as the plan has", found=transport.world_size, remedy="Start them."
        )
    site, num_features = _site_of_sums(plan), int(plan.model.config["hidden_size"])
    timings: list[Timing] = []
    deadline = time.perf_counter() + budget_s
    num_tokens = 1
    while (nbytes := num_tokens * num_features * dtype.itemsize) <= LARGEST_NBYTES:
        times = _extrapolated(timings, num_tokens)
        rounds = _of_first_rank(transport, _affordable_rounds(times, deadline, budget_s))
        timing = Timing(num_tokens=num_tokens, nbytes=nbytes, seconds=times, measured=rounds > 0)
        if rounds:
            tell(Progress(f"timing sums of {num_tokens} tokens"))
            x_TE = torch.zeros(num_tokens, num_features, dtype=dtype)
            ways = _ways(site, plan.groups, x_TE, transport, feeds_back=bool(plan.feedback.chains))
            timing = replace(timing, seconds=_measured(ways, rounds, transport))
            best = ways[timing.best(FORMS)]
            timing = replace(timing, waiting_s=_of_first_rank(transport, _waiting_s(best, rounds)))
        timings.append(timing)
        num_tokens *= GROWTH
    coded, plain = ({num_features: _thresholds(timings, forms)} for forms in (FORMS, FORMS[1:]))
    decisions = Decisions(
        coded=coded,
        plain=plain,
        transport=transport.name,
        waits={num_features: [(timing.num_tokens, timing.waiting_s) for timing in timings if timing.measured]},
        weights_gbps=_of_first_rank(transport, weights_gbps(dtype)),
        logits_s=_of_first_rank(transport, _logits_s(plan.model.config.get("vocab_size", 0), transport, dtype)),
    )
    return Tuning(decisions=decisions, timings=timings)


def tune_on_ranks(
    plan: Plan, *, transport: str = "auto", timeout_s: float = DEFAULT_TIMEOUT_S, weights: Weights = "stored"
) -> tuple[Tuning, list[Timed]]:
    """The tuning of `plan` on ranks of its own, started on this machine; under torchrun, on those that it started.

    With it the products of its model, in `weights`, as `one_and_shares` times them.
    Raises what `tune` raises, and InvalidInputError under torchrun with another number of ranks.
    """
    check_transport(transport)
    return run(_tune_on_rank, plan.split.world_size, plan.to_bytes(), transport, weights, timeout_s=timeout_s)[0]


def _tune_on_rank(data: bytes, transport: str, weights: Weights) -> tuple[Tuning, list[Timed]]:
    hurry_engine()
    plan, ranks = Plan.from_bytes(data, "memory"), connect_group(None, transport=transport, device=torch.device("cpu"))
    tuning = tune(plan, ranks)
    taken_s = sums_s(plan, tuning, PROMPT_TOKENS), sums_s(plan, tuning, 1)
    return tuning, one_and_shares(plan, TorchDistributedTransport(), weights, taken_s)


def _site_of_sums(plan: Plan) -> Site:
    """The one that stands for all: where components travel, that of most of them."""
    if sums := [site for site in plan.sites.values() if site.kind == "sum"]:
        return max(sums, key=_num_components)
    raise InvalidInputError("tune", expected="a plan with sums", found="none in it", remedy="Calibrate with -tp.")


def _num_components(site: Site) -> int:
    codec = site.codecs[0]
    return codec.num_components if isinstance(codec, TransformCodec) else 0


def _affordable_rounds(expected: Mapping[Choice, float], deadline: float, budget_s: float) -> int:
    """Rounds over all ways that fit into the time that is left; 0 for too few, from where on none are measured."""
    if not expected:
        return MAX_ROUNDS
    one_round = sum(expected.values())
    if MIN_ROUNDS * one_round > deadline - time.perf_counter():
        return 0
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / 10 / one_round)))


def _of_first_rank(transport: Transport, value: Any) -> Any:
    """The JSON value that rank 0 passed."""
    return json.loads(transport.share(json.dumps(value), "measuring sums")[0])


def _measured(ways: Mapping[Choice, Case], rounds: int, transport: Transport) -> dict[Choice, float]:
    """Rank 0's medians, after a round that does not count."""
    interleaved(ways, 1)
    medians = {str(way): statistics.median(seconds(spans)) for way, spans in interleaved(ways, rounds).items()}
    return {Choice.parse(way): median for way, median in _of_first_rank(transport, medians).items()}


def _waiting_s(case: Case, rounds: int) -> float:
    """Median seconds of a run in which this thread does nothing."""
    found = []
    for _ in range(rounds):
        case.prepare()
        start, busy = time.perf_counter(), time.thread_time()
        case.run()
        found.append(time.perf_counter() - start - (time.thread_time() - busy))
    return max(statistics.median(found), 0.0)


def weights_gbps(dtype: torch.dtype, num_tokens: int = FEW_TOKENS) -> float:
    """The rate at which a product of few tokens reads its weights, GB/s; they are too many for a cache."""
    x_TF, weight_EF = torch.ones(num_tokens, 4096, dtype=dtype), torch.ones(8192, 4096, dtype=dtype)
    product = Case(lambda: multiply_dense(weight_EF, x_TF))
    taken_s = statistics.median(seconds(interleaved({"": product}, MIN_ROUNDS)[""]))
    return weight_EF.nbytes / taken_s / 1e9


def _logits_s(vocab_size: int, transport: Transport, dtype: torch.dtype) -> float:
    """Median seconds in which all ranks have the logits of one token that they share out."""
    num_columns = [len(each) for each in torch.empty(vocab_size).tensor_split(transport.world_size)]
    own_TV = torch.zeros(1, num_columns[transport.rank], dtype=dtype)

    def gather() -> None:
        steps = all_gather_features_steps(own_TV, uncoded(dtype).codecs[0], num_columns, transport.rank)
        Pending(steps, transport).wait()

    return statistics.median(seconds(interleaved({"": Case(gather)}, MAX_ROUNDS)[""]))


def _ways(
    site: Site, groups: tuple[tuple[int, ...], ...], x_TE: Tensor, transport: Transport, *, feeds_back: bool
) -> dict[Choice, Case]:
    """Sums of `x_TE`."""
    ways = {Choice("native"): Case(lambda: transport.native_all_reduce(x_TE))}
    coded = Hops(site.codecs, groups)
    if feeds_back:
        residue = torch.zeros(3, *x_TE.shape, dtype=feedback.DTYPE)
        coded = feedback.Feedback(num_sources=(1, 1, 1)).hops(coded, residue)
    for form, hops in (("plain", uncoded(x_TE.dtype)), ("coded", coded)):
        for name, algorithm in (ALGORITHMS | NODE_ALGORITHMS).items():
            if algorithm.recodes and transport.world_size == 2:
                continue  # two ranks send as many bytes in one hop
            if algorithm.sent(hops, len(x_TE), x_TE.shape[1], transport.rank, transport.world_size) is None:
                continue
            ways[Choice(form, name)] = Case(_sum(x_TE, hops, transport, name))
    return ways


def _sum(x_TE: Tensor, hops: Hops, transport: Transport, algorithm: str) -> Callable[[], Tensor]:
    """A sum in place."""
    return lambda: Pending(
        deferred_all_reduce_steps(Deferred.of(x_TE), x_TE, hops, transport, algorithm), transport
    ).wait()


def _extrapolated(timings: Sequence[Timing], num_tokens: int) -> dict[Choice, float]:
    """The last size's time, and for all tokens beyond it what a token took there above the least that was seen."""
    if not timings:
        return {}
    last = timings[-1]
    found = {}
    for choice, taken in last.seconds.items():
        least = min(timing.seconds[choice] for timing in timings if choice in timing.seconds)
        found[choice] = taken + (taken - least) / last.num_tokens * (num_tokens - last.num_tokens)
    return found


def _thresholds(timings: Sequence[Timing], forms: Sequence[str]) -> Thresholds:
    """The best way of each size; between two sizes it changes in the (geometric) middle."""
    thresholds: list[tuple[int, Choice]] = []
    for timing in timings:
        best = timing.best(forms)
        if not thresholds:
            thresholds.append((1, best))
        elif thresholds[-1][1] != best:
            thresholds.append((timing.num_tokens // math.isqrt(GROWTH), best))
    return tuple(thresholds)
