"""The second half of calibration: from what was seen, a plan."""

import base64
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from narrowcast.attach import attach
from narrowcast.calibration.fit import fit, least_bits
from narrowcast.calibration.moments import Moments
from narrowcast.calibration.observers import ErrorObserver
from narrowcast.calibration.observing import observed, run
from narrowcast.calibration.recipes import CodecByKind, recipes_by_kind, spelt
from narrowcast.codecs import Codec, FittedRecipe, Ranges, Recipe
from narrowcast.codecs import recipe as recipe_of_one
from narrowcast.engines import engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Split
from narrowcast.scores import compare, log_probs
from narrowcast.transport import Groups, transports_of

# A plan of a wanted quality is looked for among multiples of this many bits a value.
BITS_STEP, MOST_BITS = 1 / 16, 8.0


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Everything that calibration saw.

    `chains`: which sums can leave what they lose to the next one. `ranges` by site and hop; second `moments` of sums,
    where they were asked for. `head`: the sequences that errors are measured on; `held_out`: those that no moment was
    taken of, to judge a plan by.
    """

    model: nn.Module
    split: Split
    groups: tuple[tuple[int, ...], ...]
    chains: Chains
    ranges: Mapping[str, Sequence[Ranges]]
    moments: Mapping[str, Moments]
    calibration: Mapping[str, Any]
    head: Sequence[Tensor]
    held_out: Sequence[Tensor]

    def plan(self, codec: CodecByKind, *, within: str | Recipe = "bf16") -> Plan:
        """The plan of these codecs, asked for as in `calibrate`; `within` serves in nodes."""
        recipes, engine = recipes_by_kind(codec), engine_of(self.model)
        kinds = {name: kind for name, kind in engine.sites(self.model, self.split).items() if kind in recipes}
        if not kinds and engine.split_of(self.model).pp_size == 1:  # another pipeline stage may have some
            raise InvalidInputError(
                "codec",
                expected=f"one for {' or '.join(sorted(set(engine.sites(self.model, self.split).values())))}",
                found=f"codecs for {', '.join(recipes) or 'nothing'}",
                remedy="Name a kind of site that this model has, such as codec={'logits': 'int8-group128'}.",
            )
        of_nodes, of_sums, asked = recipe_of_one(within), recipes.get("sum"), {"codec": spelt(recipes)}
        sites = {
            name: Site(kind=kind, codecs=self._codecs(name, recipes[kind], of_nodes), error={})
            for name, kind in kinds.items()
            if not isinstance(recipes[kind], FittedRecipe)
        }
        if not isinstance(of_sums, FittedRecipe):
            return self._finished(sites, asked)
        self._check_fittable(of_sums)
        if of_sums.target_kl is None:
            bits = of_sums.bits or of_sums.default_bits
            return self._finished(sites | self._fitted(of_sums, bits), asked | {"bits": bits})
        return self._finished(*self._reaching(of_sums, of_sums.target_kl, sites, asked))

    def _codecs(self, name: str, chosen: Recipe, within: Recipe) -> tuple[Codec, ...]:
        """By hop: the ranks' values, their sum, and the sums of nodes."""
        partial, *sums = self.ranges[name]
        if len(sums) < 2:
            return tuple(chosen.codec(seen) for seen in (partial, *sums))
        total, of_nodes = sums
        return within.codec(partial), within.codec(total), chosen.codec(of_nodes)

    def _check_fittable(self, recipe: FittedRecipe) -> None:
        if self.groups:
            reason, remedy = "as sums of nodes are not yet", "Leave the groups (--nodes) out."
        elif not self.moments:
            reason, remedy = "as no second moments were observed", f"Pass moments='{recipe.moments}' to observe."
        else:
            return
        raise InvalidInputError(
            "codec", expected=f"one that is not fitted to the whole model, {reason}", found=recipe, remedy=remedy
        )

    def _fitted(self, recipe: FittedRecipe, bits: float) -> dict[str, Site]:
        made = fit(self.moments, recipe, bits=bits, algorithm=recipe.algorithm_among(self.split.tp_size))
        return {
            name: Site(kind="sum", codecs=each.codecs, error={}, transform=each.transform)
            for name, each in made.items()
        }

    def _reaching(
        self, recipe: FittedRecipe, target_kl: float, sites: Mapping[str, Site], asked: Mapping[str, Any]
    ) -> tuple[dict[str, Site], dict[str, Any]]:
        """Sites with as few bits as keep the KL divergence below the target; InvalidInputError if none do."""
        batches = [ids[None] for ids in self.held_out]
        with evaluating(self.model):
            reference = [log_probs(self.model, ids) for ids in batches]
        algorithm = recipe.algorithm_among(self.split.tp_size)

        def tried(steps: int) -> tuple[dict[str, Site], float]:
            made = {**sites, **self._fitted(recipe, steps * BITS_STEP)}
            with evaluating(self.model), attach(self.model, self._plan(made, {}), simulate=True, algorithm=algorithm):
                found = [log_probs(self.model, ids) for ids in batches]
            return made, compare(reference, found, batches).kl_nats

        few, many = self._too_few_steps(), round(MOST_BITS / BITS_STEP)
        best, kl = tried(many)
        if kl > target_kl:
            raise InvalidInputError(
                "target KL",
                expected=f"{kl:.2g} nats or more, which {MOST_BITS:g} bits a value cost here",
                found=target_kl,
                remedy="Ask for more, or for bits.",
            )
        while many - few > 1:
            middle = (few + many) // 2
            made, found_kl = tried(middle)
            if found_kl <= target_kl:
                best, kl, many = made, found_kl, middle
            else:
                few = middle
        return best, {**asked, "bits": many * BITS_STEP, "held_out_kl": float(f"{kl:.4g}")}

    def _too_few_steps(self) -> int:
        """Of BITS_STEP: so many are less than a plan can be made of, one more may be enough."""
        num_features = min(each.partial.shape[1] for each in self.moments.values())
        return math.ceil(least_bits(num_features) / BITS_STEP) - 1

    def _finished(self, sites: Mapping[str, Site], asked: Mapping[str, Any]) -> Plan:
        """The plan of these sites, with the errors that they make."""
        observer = ErrorObserver(sites, self.groups)
        with observed([observer], self.model, self.split):
            for ids in self.head:
                run(self.model, ids)
        errors = observer.errors()
        measured = {name: dataclasses.replace(site, error=errors.get(name, {})) for name, site in sites.items()}
        plan = self._plan(measured, asked)
        engine = engine_of(self.model)
        return plan if engine.split_of(self.model) == Split() else _merged(plan, engine.groups(self.model))

    def _plan(self, sites: Mapping[str, Site], asked: Mapping[str, Any]) -> Plan:
        return Plan(
            split=self.split,
            groups=self.groups,
            model=engine_of(self.model).fingerprint(self.model),
            calibration={**asked, **self.calibration},
            sites=sites,
            feedback=self.chains,
        )


def _merged(plan: Plan, groups: Groups) -> Plan:
    """The plan that all ranks' plans make together: of weights that others hold, and of sites at other stages."""
    for transport in transports_of(groups):
        if transport is not None:
            texts = transport.share(base64.b85encode(plan.to_bytes()).decode(), "merging plans")
            plans = [Plan.from_bytes(base64.b85decode(text), "of another rank") for text in texts]
            sites = {name: site for each in plans for name, site in each.sites.items()}
            model = functools.reduce(ModelFingerprint.merged, [each.model for each in plans])
            feedback = functools.reduce(Chains.joined, [each.feedback for each in plans])
            plan = dataclasses.replace(plan, model=model, sites=sites, feedback=feedback)
    return plan
