"""The front door: `attach` makes a loaded model send what a plan says."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from narrowcast.collectives import check_algorithm, check_name
from narrowcast.collectives.clock import Span
from narrowcast.engines import Engine, device_of, engine_of
from narrowcast.engines.agreement import agreed
from narrowcast.engines.forwards import Forwards
from narrowcast.errors import InvalidInputError, NarrowcastError, PlanMismatchError
from narrowcast.plan import Plan
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import SUMS, UNCODED, Split
from narrowcast.plan.summary import feedback_in_words
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.planned import PlannedWires
from narrowcast.runtime.prompts import MIN_TOKENS, PIPELINED_TOKENS, Chunks, Prompts
from narrowcast.runtime.reports import Report
from narrowcast.runtime.sampling import check_sampling
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.turns import import_greenlet
from narrowcast.transport import Transport, check_timeout, check_transport, transports_of

logger = logging.getLogger(__name__)

_ATTACHED = "_narrowcast_handle"


class Handle:
    """A plan at work on a model. `remove()` restores the model exactly; leaving a `with` block does so too.

    Several suspended handles may stand by on one model; one at most is at work. `transport`: the name of what carries
    payloads, empty where nothing does.
    """

    def __init__(
        self, model: nn.Module, forwards: Forwards, sites: Sites, prompts: Prompts | None, transport: str
    ) -> None:
        self._model, self._sites, self._prompts, self.transport = model, sites, prompts, transport
        self._forwards: Forwards | None = forwards
        setattr(model, _ATTACHED, self)

    def report(self) -> Report:
        """The figures of what this rank has sent since `attach`."""
        return replace(self._sites.report(), prompts={} if self._prompts is None else dict(self._prompts.counted))

    def trace(self) -> list[Span]:
        """A list that takes where time goes, stretch by stretch, from now on; the report's figures begin anew.

        Of a plan that was attached with `timed=True`; InvalidInputError otherwise.
        """
        if not self._sites.timed:
            raise InvalidInputError(
                "trace",
                expected="a plan whose time is counted",
                found="timed=False",
                remedy="Attach it with timed=True.",
            )
        return self._sites.trace()

    def suspend(self) -> None:
        """Give the model back the forwards that it had until `resume`; a second call does nothing."""
        if self._forwards is not None and getattr(self._model, _ATTACHED, None) is self:
            self._forwards.suspend()
            delattr(self._model, _ATTACHED)

    def resume(self) -> None:
        """Take the model over again, without comparing anything again; every rank calls this.

        Raises InvalidInputError where a plan is at work, and after `remove`.
        """
        check_detached(self._model)
        if self._forwards is None:
            raise InvalidInputError(
                "handle",
                expected="one that was suspended",
                found="one that was removed",
                remedy="Attach the plan again.",
            )
        self._forwards.resume()
        setattr(self._model, _ATTACHED, self)

    def remove(self) -> None:
        """Give the model back the forwards that it had, for good; a second call does nothing."""
        self.suspend()
        self._forwards = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    simulate: bool = False,
    count_only: bool = False,
    algorithm: str = "auto",
    deterministic: bool = False,
    feedback: bool = True,
    timed: bool = False,
    sample_every: int = 0,
    prompt_chunks: Chunks = "auto",
    transport: str = "auto",
    timeout_s: float | None = None,
) -> Handle:
    """Make `model` send its partial sums, and what else the plan names, as `plan` says; every rank calls this.

    `model`: one that its engine has split as the plan says, or, with `simulate=True`, a whole one, which then does
    the same arithmetic for all ranks in this process.
    `count_only=True`: everything travels uncoded, and the report says what would have been sent.
    `algorithm`: one of `narrowcast.collectives.ALGORITHMS`, always coded; or "auto", which takes what `narrowcast
    tune` found fastest for the size (uncompressed included), or in a plan without that the one that sends fewest bytes.
    `deterministic=True`: one algorithm for all sizes, always coded, and one way to multiply, so that no sum and, on the
    CPU, no product of a linear layer depends on the batch; prompts of models in BF16 then take twice as long.
    `feedback=False`: what a payload loses is lost for good, and not made good by the next sum where the plan says that
    it can be.
    `timed=True`: the report says, besides bytes, where time went: encoding, exchanging, decoding, waiting.
    `sample_every=N`: at one of N calls of a site the report compares what its ranks decode with the exact sum of what
    they put in, for a few tokens (`narrowcast.runtime.sampling`; 1000 costs less than 1 %); 0 for never.
    `prompt_chunks=2`: the halves of a long prompt take turns, one computing while sums of the other travel (needs
    greenlet); simulated, one runs after the other, which is the same arithmetic. In a pipeline one half is in the next
    stage while the other is in this one. 1: one forward. "auto": halves from that number of tokens on from which
    `narrowcast tune` found enough to be waited for, or from 128 on in a pipeline; else one forward.
    `transport`: "tcp", our own mesh of connections; "torch", whatever torch.distributed does; "auto", which takes the
    mesh for models on the CPU where every rank has the compiled module.
    `timeout_s`: seconds until a rank that others wait for is lost; by default those that `transport.connect` was given,
    or 60 where it was not called.
    Ranks whose random states differ are seeded alike, by rank 0's, so that all sample the same tokens.
    Raises InvalidInputError for a model that cannot be served, PlanMismatchError for a plan that is not for this
    model or not the same on every rank, PeerLostError when a rank does not come.
    """
    engine, device = engine_of(model), device_of(model)
    _check_arguments(plan, algorithm, transport, prompt_chunks, deterministic, sample_every)
    if timeout_s is not None:
        check_timeout(timeout_s)
    decided = prompt_chunks == "auto" and algorithm == "auto" and not deterministic
    halves_from = MIN_TOKENS if prompt_chunks == 2 else _halves_from(model, plan) if decided else None
    prompts = None if halves_from is None else Prompts(halves_from)
    codecs = {name: site.codecs for name, site in plan.sites.items()}
    sites = Sites(
        codecs,
        plan.groups,
        algorithm,
        device,
        chains=plan.feedback if feedback else Chains(),
        decisions=plan.decisions,
        deterministic=deterministic,
        timed=timed,
        kinds={name: site.kind for name, site in plan.sites.items()},
        expected=_expected(plan, feedback),
        sample_every=sample_every,
    )
    wires: Simulator | Communicator
    over = ""
    if simulate:
        _check_attachable(engine, model, plan, whole=True)
        wires = Simulator(sites, plan.tp_size, count_only=count_only)
    else:
        _check_split(engine, model, plan)
        tp, pp = transports_of(engine.groups(model), transport=transport, device=device, timeout_s=timeout_s)
        options: dict[str, object] = {"count_only": count_only, "deterministic": deterministic, "feedback": feedback}
        options["sample_every"] = sample_every
        chunks = "one forward" if halves_from is None else f"halves from {halves_from} tokens on"
        mine = {"plan": plan.fingerprint, "algorithm": algorithm, "prompt_chunks": chunks}
        mine |= {name: str(value) for name, value in options.items()}
        connected = [each for each in (tp, pp) if each is not None]
        in_turns = prompts is not None and plan.split.pp_size == 1
        _check_on_all_ranks(engine, model, plan, connected, mine, in_turns=in_turns)
        over = " and ".join(sorted({each.name for each in connected}))
        _tell(plan, algorithm, sites, tp, over)
        wires = Communicator(sites, tp=tp, pp=pp, count_only=count_only)
    _tell_of_feedback(plan, feedback)
    forwards = engine.take_over(model, plan.split, wires)
    if prompts is not None:
        _halve(prompts, engine, model, plan.split, wires, forwards)
    return Handle(model, forwards, sites, prompts, over)


def _halves_from(model: nn.Module, plan: Plan) -> int | None:
    """The tokens from which on prompts run in halves, alike on every rank; None for never.

    In a pipeline those that gain there, otherwise those that the plan's table has.
    """
    if plan.split.pp_size > 1:
        return PIPELINED_TOKENS
    num_sums = sum(site.kind in SUMS for site in plan.sites.values())
    if not plan.decisions.waits or not num_sums:
        return None
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())  # of all ranks
    return plan.decisions.halves_from(engine_of(model).num_features(model), weights / plan.tp_size / num_sums)


def _expected(plan: Plan, feedback: bool) -> dict[str, Mapping[str, float]]:
    """Relative errors of sums by site and algorithm; none where they lose for good what the plan has them feed back."""
    known = feedback or not plan.feedback.chains
    return {name: site.error for name, site in plan.sites.items()} if known else {}


def check_loaded(model: nn.Module) -> None:
    """InvalidInputError if weights of `model` are elsewhere: offloaded, or never loaded."""
    missing = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if missing is not None:
        raise InvalidInputError(
            type(model).__name__,
            expected="a model whose weights are in memory",
            found=f"none of {missing}: offloaded, or never loaded",
            remedy="Load it without device_map or offloading.",
        )


def check_detached(model: nn.Module) -> None:
    """InvalidInputError if a plan is attached to `model`."""
    if hasattr(model, _ATTACHED):
        raise InvalidInputError(
            type(model).__name__,
            expected="a model without a plan",
            found="one that has a plan attached",
            remedy="Call remove() or suspend() on its handle first.",
        )


def _check_arguments(
    plan: Plan, algorithm: str, transport: str, prompt_chunks: object, deterministic: bool, sample_every: int
) -> None:
    if not isinstance(plan, Plan):
        raise InvalidInputError("attach", expected="a Plan", found=repr(plan), remedy="Load it with Plan.load(path).")
    check_name(algorithm)
    check_transport(transport)
    if prompt_chunks not in ("auto", 1, 2):
        raise InvalidInputError(
            "prompt_chunks", expected="auto, 1 or 2", found=repr(prompt_chunks), remedy="More than two never paid."
        )
    check_sampling("sample_every", sample_every)
    if deterministic and prompt_chunks == 2:
        raise InvalidInputError(
            "deterministic",
            expected="one forward for a prompt",
            found="prompt_chunks=2, which rounds otherwise than one",
            remedy="Leave out one of the two.",
        )
    for site in plan.sites.values():
        if site.kind in SUMS:
            check_algorithm(algorithm, site.codecs, plan.groups)


def _check_split(engine: Engine, model: nn.Module, plan: Plan) -> None:
    plan.check_real()
    if engine.split_of(model) == Split():
        raise InvalidInputError(
            type(model).__name__,
            expected=f"a model split by {plan.split}",
            found="a whole one",
            remedy="Load it with distributed_config=DistributedConfig(tp_size=...), or pass simulate=True.",
        )


def _tell(plan: Plan, algorithm: str, sites: Sites, tp: Transport | None, over: str) -> None:
    tuned_over = sites.decisions.transport
    if tp is not None and tuned_over not in ("", tp.name):
        logger.warning("the plan was tuned over %s, and now runs over %s: tune it again", tuned_over, tp.name)
    logger.info("plan %s at %d sites, algorithm %s, over %s", plan.fingerprint[:12], len(plan.sites), algorithm, over)


def _tell_of_feedback(plan: Plan, feedback: bool) -> None:
    if feedback:
        logger.info("%s", "; ".join(feedback_in_words(plan)))
    elif plan.feedback.chains:
        kl, without = (plan.calibration.get(name, "?") for name in ("kl_nats", "kl_nats_without_feedback"))
        logger.warning(
            "the plan was calibrated for depth feedback, which is turned off: expect a KL divergence of %s nats, not "
            "%s; or calibrate without it",
            without,
            kl,
        )


def _check_on_all_ranks(
    engine: Engine,
    model: nn.Module,
    plan: Plan,
    connected: Sequence[Transport],
    mine: Mapping[str, str],
    *,
    in_turns: bool,
) -> None:
    """Refuse on all ranks what any of them refuses, and other plans or options than those of the rest."""
    refusal = None
    try:
        _check_attachable(engine, model, plan, whole=False)
        if in_turns:
            import_greenlet()
    except NarrowcastError as error:
        refusal = error
    for each in connected:
        refusal = agreed(each, mine, refusal)
    if refusal is not None:
        raise refusal
    for each in connected:
        _agree_on_seed(each)


def _agree_on_seed(transport: Transport) -> None:
    """Seed torch alike on all ranks where it is not: each samples tokens by itself, and all must sample the same."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
    mine = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()
    every = transport.share(mine, "comparing random states")
    if len(set(every)) > 1:
        logger.info("ranks were seeded differently: they go on as rank 0 is seeded")
        torch.manual_seed(int(every[0][:15], 16))


def _halve(
    prompts: Prompts, engine: Engine, model: nn.Module, split: Split, wires: PlannedWires, forwards: Forwards
) -> None:
    """Let long prompts run in halves; with the model as it was, what `_check_turns` raises."""
    logger.info("prompts of %d tokens and more run in halves", prompts.min_tokens)
    engine.halve_prompts(model, wires, prompts, forwards)
    if not isinstance(wires, Communicator) or split.pp_size > 1:  # where nothing takes turns
        return
    try:
        _check_turns(engine, model, wires, prompts)
    except BaseException:
        forwards.restore()
        raise
    wires.sites.forget()


def _check_turns(engine: Engine, model: nn.Module, wires: Communicator, prompts: Prompts) -> None:
    """InvalidInputError on every rank unless a prompt in turns is what it is with one half after the other."""
    min_tokens, prompts.min_tokens = prompts.min_tokens, MIN_TOKENS
    in_turns = engine.short_prompt(model, MIN_TOKENS)
    wires.takes_turns = False
    in_sequence = engine.short_prompt(model, MIN_TOKENS)
    wires.takes_turns, prompts.min_tokens = True, min_tokens
    prompts.counted.clear()
    differing = wires.tp.share("" if torch.equal(in_turns, in_sequence) else "differs", "comparing turns")
    if any(differing):
        raise InvalidInputError(
            type(model).__name__,
            expected="a prompt that is the same in turns and with one half after the other",
            found=f"another one on ranks {[rank for rank, each in enumerate(differing) if each]}",
            remedy="Attach with prompt_chunks=1, and report this model.",
        )


def _check_attachable(engine: Engine, model: nn.Module, plan: Plan, *, whole: bool) -> None:
    check_detached(model)
    found = engine.split_of(model)
    if whole and found != Split():
        raise InvalidInputError(
            type(model).__name__,
            expected="a whole model to simulate on",
            found=f"one split by {found}",
            remedy="Load it without distributed_config, or attach without simulate=True.",
        )
    check_loaded(model)
    plan.check(engine.fingerprint(model), plan.split if whole else found)
    reading = {name for norm, reader in plan.feedback.readers.items() for name in (norm, *reader.modules)}
    if found.pp_size == 1 and (unknown := reading - dict(model.named_modules()).keys()):
        raise PlanMismatchError(
            "plan",
            expected="feedback into modules of this model",
            found=f"into {min(unknown)!r}",
            remedy="Calibrate this model.",
        )
    coded = {site.kind for site in plan.sites.values()}
    here = {name for name, kind in engine.sites(model, plan.split).items() if kind in coded}
    elsewhere = set(plan.sites) - here
    if elsewhere and found.pp_size == 1 and {plan.sites[name].kind for name in elsewhere} <= set(UNCODED):
        raise PlanMismatchError(
            "plan",
            expected=f"a model whose {' and '.join(sorted(elsewhere))} ranks share out, as the plan codes what travels",
            found="one that has them whole on every rank",
            remedy='Load it with replicated="none", or calibrate without a codec for them.',
        )
    if here - set(plan.sites) or (elsewhere and found.pp_size == 1):
        raise PlanMismatchError(
            "plan",
            expected=f"the sites {sorted(here)[:2]}, ...",
            found=f"differences at {sorted(here ^ set(plan.sites))[:3]}",
            remedy="Calibrate this model.",
        )
