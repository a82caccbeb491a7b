"""A plan in words and figures: short names, bits a value."""

from collections.abc import Collection, Iterator

from narrowcast.aligned import aligned
from narrowcast.codecs import Codec, FeatureCodec, TransformCodec
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.plan.plan import Plan, Site

OWN_AXES = "a rank's own axes have no place for what it lost before; where a sum travels again it is made good"
# Tokens of calibration text that are enough for scales, and for a matrix of so many features: docs/calibration.md.
ENOUGH_TOKENS, TOKENS_BY_AXIS = 1000, 64
LOST = 0.5  # relative error from which on little is left of a token
LASTS = "all but the last one of a stage, after which all ranks go on alike"
ALONE = "no other sum of its stage goes into the residual stream as it does"


def codec_name(codec: Codec) -> str:
    """Its preset or spelling where there are no calibrated tensors, otherwise the id of its format."""
    return str(codec) if isinstance(codec, DynamicCodec) else codec.id


def short_name(site: str) -> str:
    """A site's name without what all have."""
    return site.removeprefix("model.").removeprefix("layers.")


def feedback_in_words(plan: Plan) -> Iterator[str]:
    """At how many of the plan's sums the next one makes good what is lost, and whoever lost it at once; or why not."""
    chained = [site for chain in plan.feedback.chains for site in chain]
    sums = [name for name, site in plan.sites.items() if site.kind == "sum"]
    if not sums:
        return
    served = [name for name in chained if name in sums and plan.sites[name].codecs[0].feeds_back]
    yield f"depth feedback at {len(served)} of {len(sums)} sums"
    reasons = {name: plan.feedback.refused.get(name, ALONE) for name in sums if name not in served}
    reasons |= {name: OWN_AXES for name in reasons if not plan.sites[name].codecs[0].feeds_back}
    for reason in dict.fromkeys(reasons.values()):
        names = [short_name(name) for name in reasons if reasons[name] == reason]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"none at {names[0]}{others}: {reason}"
    if served:
        num_read = sum(name in plan.feedback.read for name in served)
        why = plan.feedback.unread or LASTS
        yield f"own part exact at {num_read} of {len(sums)} sums" + (f": {why}" if num_read < len(served) else "")


def bits_by_site(plan: Plan) -> dict[str, tuple[float, ...]]:
    """Bits a value, by site and hop: of the features, also where components travel in their place."""
    return {name: tuple(_bits(site, hop, plan) for hop in range(len(site.codecs))) for name, site in plan.sites.items()}


def mean_bits(plan: Plan) -> float | None:
    """The bits a value that the plan was made for, or that its payloads take on average; None for no sites."""
    if (asked := plan.calibration.get("bits")) is not None:
        return float(asked)
    hop = -1 if plan.groups else 0
    bits = [each[hop] for each in bits_by_site(plan).values()]
    return sum(bits) / len(bits) if bits else None


def in_words(plan: Plan) -> str:
    """A line on the whole plan, then a row for each kind of site and codec."""
    lines = [f"{plan!r}, of {plan.model.config.get('model_type', 'a model')}"]
    if (mean := mean_bits(plan)) is not None:
        lines[0] += f", {mean:.4g} bits a value"
    if (kl := plan.calibration.get("kl_nats")) is not None:
        where = "text that was held out" if plan.calibration.get("num_held_out") else "a part of the calibration text"
        lines.append(f"KL {kl:.3g} nats from the uncompressed model, on {where}")
    if plan.simulated_only:
        lines.append(f"simulated only: {plan.simulated_only}")
    rows = [("kind", "codec", "sites", "bits a value", "expected error")]
    hop, all_bits = -1 if plan.groups else 0, bits_by_site(plan)
    alike = {name: (site.kind, codec_name(site.codecs[hop])) for name, site in plan.sites.items()}
    for kind, codec in dict.fromkeys(alike.values()):
        here = [name for name in plan.sites if alike[name] == (kind, codec)]
        bits = [all_bits[name][hop] for name in here]
        errors = [error for name in here for error in list(plan.sites[name].error.values())[:1]]
        rows.append((kind, codec, str(len(here)), span(bits, "{:.4g}"), span(errors, "{:.3f}")))
    return "\n".join([*lines, *feedback_in_words(plan), "", aligned(rows)])


def doubts(plan: Plan) -> Iterator[str]:
    """Points to think twice about: too little calibration text, and tokens lost beside a few far larger ones."""
    about = plan.calibration
    calibrated = [codec for site in plan.sites.values() for codec in site.codecs if codec.calibrated_features]
    widest = max(
        (codec.calibrated_features or 0 for codec in calibrated if isinstance(codec, TransformCodec)), default=0
    )
    enough = TOKENS_BY_AXIS * widest or ENOUGH_TOKENS
    if calibrated and (found := int(about.get("num_tokens", enough))) < enough:
        yield f"calibrated on {found:,} tokens of text, where {enough:,} would be enough: more text makes better scales"
    ruled = {site: plan.sites[site].error for site in about.get("ruled_by_few", ()) if site in plan.sites}
    if lost := {site: min(error.values()) for site, error in ruled.items() if min(error.values(), default=0) > LOST}:
        worst = max(lost, key=lost.__getitem__)
        yield (
            f"a few tokens, such as the first ones, hold most of the power at {len(lost)} sites, and all "
            f"others have an error of {lost[worst]:.2f} at {short_name(worst)}: compare with --first-tokens skip"
        )


def numbered(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def span(figures: Collection[float], form: str) -> str:
    """From the least to the largest."""
    ends = dict.fromkeys(form.format(end) for end in (min(figures), max(figures))) if figures else {}
    return " to ".join(ends)


def with_ranges(plan: Plan) -> dict[str, FeatureCodec]:
    """Codecs of hop 0 with calibrated scales, by site."""
    return {name: site.codecs[0] for name, site in plan.sites.items() if isinstance(site.codecs[0], FeatureCodec)}


def _bits(site: Site, hop: int, plan: Plan) -> float:
    """Of as many features as the codec is calibrated for, otherwise of a hidden state."""
    codec = site.codecs[hop]
    num_features = codec.calibrated_features or plan.model.config.get("hidden_size", 4096)
    return 8 * codec.row_nbytes(num_features) / num_features
