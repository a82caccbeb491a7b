"""The second half of calibration: from what was seen, a plan."""

import base64
import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from narrowcast.calibration.fit import fit, least_bits
from narrowcast.calibration.judge import Judge
from narrowcast.calibration.metric import in_common
from narrowcast.calibration.moments import MomentObserver, Moments, of_all_stages, with_room
from narrowcast.calibration.observers import ErrorObserver, FirstTokens, RangeObserver
from narrowcast.calibration.observing import CodedWires, SampledWires, over_wires, run
from narrowcast.calibration.recipes import DEFAULT_CODEC, LAST, CodecByKind, of_last, recipes_by_kind, spelt
from narrowcast.calibration.sensitivity import Sensitivity
from narrowcast.codecs import Codec, FittedRecipe, Ranges, Recipe, TransformRecipe
from narrowcast.codecs import recipe as recipe_of_one
from narrowcast.collectives import ALGORITHMS, NODE_ALGORITHMS
from narrowcast.engines import device_of, engine_of
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import SUMS, Split
from narrowcast.progress import told
from narrowcast.runtime.sampling import Samples
from narrowcast.transport import transports_of

# A plan of a wanted quality is looked for among multiples of this many bits a value. The first try suits most models; a
# bit more divides the KL divergence by four, about.
BITS_STEP, FIRST_BITS, MOST_BITS = 1 / 16, 4.0, 8.0
STEPS_BY_LOG_KL = 1 / math.log(4) / BITS_STEP

CAREFUL_BITS = 8  # of the last sum of a stream, which sums of as many bits have anyway


@dataclass(frozen=True, kw_only=True, repr=False)
class Observations:
    """Everything that calibration saw of a model.

    `chains`: which sums can leave what they lose to the next one. `ranges` by site and hop; second `moments` of sums,
    where they were asked for, and the `sensitivities` in these. `first_tokens` and `num_first`:
    how first tokens counted. `text`: the sequences that all this was seen on; `held_out`: others, to judge a plan by.
    `about`: what a plan is to say of how it was made.
    """

    model: nn.Module
    split: Split
    groups: tuple[tuple[int, ...], ...]
    chains: Chains
    ranges: Mapping[str, Sequence[Ranges]]
    moments: Mapping[str, Moments]
    sensitivities: Mapping[str, Sensitivity]
    first_tokens: FirstTokens
    num_first: int
    text: Sequence[Tensor]
    held_out: Sequence[Tensor]
    about: Mapping[str, Any]

    def plan(
        self,
        codec: CodecByKind = DEFAULT_CODEC,
        *,
        within: str | Recipe = "bf16",
        feedback: bool = True,
        measured: bool = True,
    ) -> Plan:
        """The plan of these codecs, asked for as in `calibrate`; `within` serves in nodes.

        Unless `measured` it says nothing of the errors it makes and of the KL divergence it costs, which take runs.
        """
        recipes = recipes_by_kind(codec)
        self._check(recipes)
        chains = self.chains if feedback else self.chains.turned_off()
        moments = self._minded(chains, recipes.get("sum"))
        given = dataclasses.replace(self, chains=chains, moments=moments)
        maker = Maker(given, recipes, recipe_of_one(within), self.judge)
        return maker.measured(maker.plan()) if measured else maker.plan()

    def _minded(self, chains: Chains, of_sums: Recipe | None) -> dict[str, Moments]:
        """The moments of features, or of pairs of them, with what an error costs that lives as long as in `chains`."""
        if isinstance(of_sums, TransformRecipe):
            costs = in_common({site: each.fisher for site, each in self.moments.items()}, self.sensitivities, chains)
            return {
                site: dataclasses.replace(each, fisher_again=costs[site])
                if of_sums.axes == "ranks"
                else dataclasses.replace(each, fisher=costs[site])
                for site, each in self.moments.items()
            }
        return {
            site: dataclasses.replace(each.diagonal(), fisher=tried.fed_back if chains.chains else tried.lasting)
            for site, each, tried in ((site, each, self.sensitivities[site]) for site, each in self.moments.items())
        }

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge of plans that are made from this."""
        return Judge(self.model, self.split, self.held_out)

    def _check(self, recipes: Mapping[str, Recipe]) -> None:
        engine, of_sums = engine_of(self.model), recipes.get("sum")
        found = set(engine.sites(self.model, self.split).values())
        if not found & recipes.keys() and engine.split_of(self.model).pp_size == 1:  # another stage may have some
            raise InvalidInputError(
                "codec",
                expected=f"one for {' or '.join(sorted(found))}",
                found=f"codecs for {', '.join(recipes) or 'nothing'}",
                remedy="Name a kind of site that this model has, such as codec={'logits': 'int8-group128'}.",
            )
        if not isinstance(of_sums, FittedRecipe):
            return
        if self.groups and isinstance(of_sums, TransformRecipe):
            expected, remedy = "no transform, as sums of nodes have none yet", "Leave the groups (--nnodes) out."
        elif not self.moments and "sum" in found:
            expected = "one that is not fitted to the whole model, as no second moments were observed"
            remedy = f"Pass moments='{of_sums.moments}' to observe."
        else:
            return
        raise InvalidInputError("codec", expected=expected, found=of_sums, remedy=remedy)


class Maker:
    """Makes a plan: a draft from what was seen uncoded, then a plan from what is coded where the draft is at work."""

    def __init__(self, given: Observations, recipes: Mapping[str, Recipe], within: Recipe, judge: Judge) -> None:
        self._given, self._recipes, self._within, self._judge = given, recipes, within, judge
        sites = engine_of(given.model).sites(given.model, given.split)
        self._kinds = {name: kind for name, kind in sites.items() if kind in recipes}
        of_sums = recipes.get("sum")
        self._fitted = of_sums if isinstance(of_sums, FittedRecipe) and given.moments else None

    def plan(self) -> Plan:
        """The plan, which says how it was made."""
        fitted, bits = self._fitted, None
        if fitted is not None:
            bits = fitted.bits or (FIRST_BITS if fitted.target_kl else fitted.default_bits)
        seen = self._seen_under(self._plan(self._sites(self._drafted(), bits), {}))
        if fitted is not None and fitted.target_kl is not None:
            bits = self._fewest_bits(seen, fitted.target_kl)
        return self._complete(self._sites(seen, bits), {} if bits is None else {"bits": bits})

    def measured(self, plan: Plan) -> Plan:
        """The plan, which says what errors its codecs make and what KL divergence it costs on what was held out."""
        errors = self._errors(plan)
        own = {
            name: dataclasses.replace(site, error=errors.get(name, {}))
            for name, site in plan.sites.items()
            if name in self._kinds
        }
        plan = self._complete(own, plan.calibration)
        kl = {"kl_nats": self._kl(plan)}
        if any(plan.feedback.chains):
            kl["kl_nats_without_feedback"] = self._kl(dataclasses.replace(plan, feedback=plan.feedback.turned_off()))
        told = {name: float(f"{value:.4g}") for name, value in kl.items()}
        return dataclasses.replace(plan, calibration={**plan.calibration, **told})

    def _drafted(self) -> Observations:
        """The observations for a draft, where what components lose may come back in all directions, as yet unseen."""
        given = self._given
        if not (isinstance(self._fitted, TransformRecipe) and given.chains.chains):
            return given
        moments = {
            site: dataclasses.replace(
                each,
                partial=each.partial if self._fitted.axes == "ranks" else with_room(each.partial),
                total=with_room(each.total),
            )
            for site, each in given.moments.items()
        }
        return dataclasses.replace(given, moments=moments)

    def _sites(self, seen: Observations, bits: float | None) -> dict[str, Site]:
        """The sites of this rank, for sums that are fitted with so many bits a value."""
        last = {chain[-1] for chain in self._given.chains.chains}
        made = {
            name: Site(kind=kind, codecs=self._codecs(seen.ranges[name], kind, last=name in last), error={})
            for name, kind in self._kinds.items()
            if kind != "sum" or self._fitted is None
        }
        if self._fitted is None or bits is None:
            return made
        # The payloads that count; between nodes each node's alone.
        algorithm = "one_shot" if self._given.groups else self._fitted.algorithm_among(self._given.split.tp_size)
        chains = self._given.chains
        if self._given.groups:  # whose ranks do not know what their node's sum loses
            chains = dataclasses.replace(chains, unread="sums of nodes")
        for name, codecs in fit(seen.moments, self._fitted, bits=bits, algorithm=algorithm, chains=chains).items():
            if name in self._kinds:  # and not at another stage
                codecs = self._by_hop(seen.ranges[name], codecs[0]) if self._given.groups else codecs
                made[name] = Site(kind="sum", codecs=codecs, error={})
        return made

    def _codecs(self, ranges: Sequence[Ranges], kind: str, *, last: bool) -> tuple[Codec, ...]:
        """By hop: the ranks' values, their sum, and the sums of nodes."""
        codecs = [self._recipes[kind].codec(seen) for seen in ranges]
        num_features = ranges[0].low.shape[1]
        if last and (LAST in self._recipes or 8 * codecs[0].row_nbytes(num_features) < CAREFUL_BITS * num_features):
            codecs = [of_last(self._recipes).codec(seen) for seen in ranges]
        return self._by_hop(ranges, codecs[-1]) if self._given.groups and kind in SUMS else tuple(codecs)

    def _by_hop(self, ranges: Sequence[Ranges], of_nodes: Codec) -> tuple[Codec, ...]:
        partial, total, _ = ranges
        return self._within.codec(partial), self._within.codec(total), of_nodes

    def _seen_under(self, draft: Plan) -> Observations:
        """All that is coded while the draft is at work: sums with what was lost of those before."""
        given = self._given
        ranges = RangeObserver(given.first_tokens, given.num_first, given.groups)
        num_left_out = 0 if given.first_tokens == "count" else given.num_first
        full = isinstance(self._fitted, TransformRecipe)
        of_moments = MomentObserver(given.groups, full=full, num_left_out=num_left_out)
        wires = CodedWires([ranges, of_moments] if given.moments else [ranges], draft)
        calibrated = any(codec.num_sources is not None for site in draft.sites.values() for codec in site.codecs)
        if not _at_any_stage(given.model, wires.feed_back and calibrated):
            return given
        with over_wires(wires, given.model, given.split):
            for ids in told(given.text, "calibrating under feedback"):
                run(given.model, ids)
        means = of_all_stages(given.model, of_moments.means())
        moments = {
            site: dataclasses.replace(each, partial=means[site][0], total=means[site][1])
            for site, each in given.moments.items()
        }
        return dataclasses.replace(given, ranges=ranges.ranges(given.ranges), moments=moments)

    def _fewest_bits(self, seen: Observations, target_kl: float) -> float:
        """As few as keep the KL divergence below the target, or the most that are tried where nobody named a target.

        InvalidInputError if the most do not meet a target that was asked for.
        """

        def kl(steps: int) -> float:
            return self._kl(self._complete(self._sites(seen, steps * BITS_STEP), {}))

        num_features = min(each.partial.shape[1] for each in seen.moments.values())
        few = math.ceil(least_bits(num_features) / BITS_STEP) - 1  # are less than a plan can be made of
        steps, found = fewest(kl, target_kl, few, round(MOST_BITS / BITS_STEP))
        if found > target_kl and self._fitted != DEFAULT_CODEC:
            raise InvalidInputError(
                "target KL",
                expected=f"{found:.2g} nats or more, which {MOST_BITS:g} bits a value cost here",
                found=target_kl,
                remedy="Ask for more, or for bits.",
            )
        return steps * BITS_STEP

    def _errors(self, plan: Plan) -> dict[str, dict[str, float]]:
        """By site and algorithm, what coding loses on text that was held out: as sampled sums measure it."""
        model, found = self._given.model, defaultdict[str, dict[str, float]](dict)
        seen_once = ErrorObserver({name: site for name, site in plan.sites.items() if site.kind not in SUMS})
        for algorithm in (*ALGORITHMS, *(NODE_ALGORITHMS if plan.groups else ())):
            wires = SampledWires([seen_once], plan, algorithm, device_of(model))
            with over_wires(wires, model, plan.split):
                for ids in told(self._given.held_out, "measuring errors"):
                    run(model, ids)
            for name, samples in wires.samples.items():
                found[name][algorithm] = _rounded(samples)
        for name, samples in seen_once.samples.items():
            found[name]["once"] = _rounded(samples)
        return found

    def _kl(self, plan: Plan) -> float:
        """The KL divergence of a plan, by the algorithm that its codecs were asked for, or that would be chosen."""
        algorithm = self._fitted.algorithm if self._fitted is not None else None
        return self._judge.kl(plan, algorithm=algorithm or "auto")

    def _plan(self, sites: Mapping[str, Site], found: Mapping[str, Any]) -> Plan:
        given = self._given
        return Plan(
            split=given.split,
            groups=given.groups,
            model=engine_of(given.model).fingerprint(given.model),
            calibration={"codec": spelt(self._recipes), **found, **given.about},
            sites=sites,
            feedback=given.chains,
        )

    def _complete(self, sites: Mapping[str, Site], found: Mapping[str, Any]) -> Plan:
        """The plan that the plans of all ranks make together: of weights that others hold, of sites at other stages."""
        plan, engine, model = self._plan(sites, found), engine_of(self._given.model), self._given.model
        if engine.split_of(model) == Split():
            return plan
        for transport in transports_of(engine.groups(model)):
            if transport is not None:
                texts = transport.share(base64.b85encode(plan.to_bytes()).decode(), "merging plans")
                plans = [Plan.from_bytes(base64.b85decode(text), "of another rank") for text in texts]
                plan = dataclasses.replace(
                    plan,
                    sites={name: site for each in plans for name, site in each.sites.items()},
                    model=functools.reduce(ModelFingerprint.merged, [each.model for each in plans]),
                    feedback=functools.reduce(Chains.joined, [each.feedback for each in plans]),
                )
        return plan


def _rounded(samples: Samples) -> float:
    """Their error, to six digits: further ones depend on the order in which tokens came."""
    return float(f"{samples.error or 0.0:.6g}")


def _at_any_stage(model: nn.Module, here: bool) -> bool:
    """True if it is so at one pipeline stage at least: all of them run the text again, or none."""
    pp = transports_of(engine_of(model).groups(model))[1]
    return here if pp is None else any(json.loads(text) for text in pp.share(json.dumps(here), "running again"))


def fewest(kl: Callable[[int], float], target_kl: float, few: int, many: int) -> tuple[int, float]:
    """As few steps as meet the target, more than `few`, or else `many`; and the KL divergence that they cost.

    `kl`: about a fourth for each bit more, by which it is guessed where to try next.
    """
    low, high, steps, best = few, many, round(FIRST_BITS / BITS_STEP), math.inf
    while True:
        found = kl(steps)
        if found <= target_kl or steps == many:
            high, best = steps, found
        else:
            low = steps
        if high - low <= 1 and best < math.inf:
            return high, best
        ratio = found / target_kl if math.isfinite(found) else math.inf
        guess = steps + math.ceil(math.log(min(max(ratio, 1e-9), 1e9)) * STEPS_BY_LOG_KL)
        steps = min(max(guess, low + 1), high - 1 if best < math.inf else many)
