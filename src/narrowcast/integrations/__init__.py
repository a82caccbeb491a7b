"""Engines, and `attach`, which makes a loaded model send what a plan says. `ENGINES` by the package of the model."""

import importlib
import json
import logging
from typing import Self, cast

import torch
from torch import nn

from narrowcast.collectives import check_algorithm
from narrowcast.communicator import Communicator, Simulator
from narrowcast.errors import InvalidInputError, MissingDependencyError, PlanMismatchError
from narrowcast.integrations.base import Engine
from narrowcast.integrations.forwards import Forwards, split_virtually
from narrowcast.monitor import Monitor, Report
from narrowcast.plan import Plan
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport, Transport

ENGINES: dict[str, str] = {"transformers": "narrowcast.integrations.transformers"}

logger = logging.getLogger(__name__)

_ATTACHED = "_narrowcast_handle"


class Handle:
    """A plan at work on a model. `remove()` restores the model exactly; leaving a `with` block does so too."""

    def __init__(self, model: nn.Module, forwards: Forwards, monitor: Monitor) -> None:
        self._model, self._forwards, self._monitor = model, forwards, monitor
        setattr(model, _ATTACHED, self)

    def report(self) -> Report:
        """What this rank has sent since `attach`."""
        return self._monitor.report()

    def remove(self) -> None:
        """Give the model back the forwards that it had; a second call does nothing."""
        self._forwards.restore()
        if getattr(self._model, _ATTACHED, None) is self:
            delattr(self._model, _ATTACHED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    simulate: bool = False,
    algorithm: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Handle:
    """Make `model` send its partial sums as `plan` says; every rank calls this with the same plan.

    `model`: one that its engine has split over the ranks of the plan, or, with `simulate=True`, a whole one,
    which then does the same arithmetic for all ranks in this process.
    `algorithm`: "one_shot", "two_shot", or "auto", which takes the one that sends fewer bytes.
    `timeout_s`: how long to wait for a rank before it counts as lost.
    Raises InvalidInputError for a model that cannot be served, PlanMismatchError for a plan that is not for this
    model or not the same on every rank, PeerLostError when a rank does not come.
    """
    engine = engine_of(model)
    if not isinstance(plan, Plan):
        raise InvalidInputError("attach", expected="a Plan", found=repr(plan), remedy="Load it with Plan.load(path).")
    for site in plan.sites.values():
        check_algorithm(algorithm, site.codecs)
    if simulate:
        _check_attachable(engine, model, plan, tp_size=plan.tp_size, whole=True)
        simulator = Simulator(plan, algorithm=algorithm, device=device_of(model))
        layers = engine.row_parallel_layers(model)
        return Handle(model, split_virtually(layers, plan.tp_size, simulator.all_reduce), simulator.monitor)
    tp_size = engine.tp_size(model)
    if tp_size == 1:
        raise InvalidInputError(
            type(model).__name__,
            expected=f"a model split over {plan.tp_size} ranks",
            found="a whole one",
            remedy="Load it with distributed_config=DistributedConfig(tp_size=...), or pass simulate=True.",
        )
    transport = TorchDistributedTransport(engine.group(model), timeout_s=timeout_s)
    refusal = None
    try:
        _check_attachable(engine, model, plan, tp_size=tp_size, whole=False)
    except InvalidInputError as error:
        refusal = error
    _agree(transport, plan, algorithm, refusal)
    communicator = Communicator(plan, transport, algorithm=algorithm, device=device_of(model))
    logger.info(
        "rank %d: plan %s at %d sites, algorithm %s", transport.rank, plan.fingerprint[:12], len(plan.sites), algorithm
    )
    return Handle(model, engine.take_over(model, communicator), communicator.monitor)


def engine_of(model: nn.Module) -> Engine:
    """The engine that made `model`; InvalidInputError if none of ours did."""
    packages = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    for package, module in ENGINES.items():
        if package in packages:
            return load_engine(module)
    raise InvalidInputError(
        type(model).__name__,
        expected=f"a model of {' or '.join(ENGINES)}",
        found=f"one of {type(model).__module__}",
        remedy="Load it through one of these engines.",
    )


def load_engine(module: str = ENGINES["transformers"]) -> Engine:
    """Import an engine's module; MissingDependencyError if the engine is not installed."""
    try:
        importlib.import_module(module.rpartition(".")[2])
        return cast(Engine, importlib.import_module(module))
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module.rpartition(".")[2], module.rpartition(".")[2]) from error


def check_detached(model: nn.Module) -> None:
    """InvalidInputError if a plan is attached to `model`."""
    if hasattr(model, _ATTACHED):
        raise InvalidInputError(
            type(model).__name__,
            expected="a model without a plan",
            found="one that has a plan attached",
            remedy="Call remove() on its handle first.",
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device


def _check_attachable(engine: Engine, model: nn.Module, plan: Plan, *, tp_size: int, whole: bool) -> None:
    check_detached(model)
    if whole and engine.tp_size(model) != 1:
        raise InvalidInputError(
            type(model).__name__,
            expected="a whole model to simulate on",
            found=f"one split over {engine.tp_size(model)} ranks",
            remedy="Load it without distributed_config, or attach without simulate=True.",
        )
    plan.check(engine.fingerprint(model), tp_size=tp_size)
    layers = set(engine.row_parallel_layers(model))
    if layers != set(plan.sites):
        raise PlanMismatchError(
            "plan",
            expected=f"the sites {sorted(layers)[:2]}, ...",
            found=f"differences at {sorted(layers ^ set(plan.sites))[:3]}",
            remedy="Calibrate this model.",
        )


def _agree(transport: Transport, plan: Plan, algorithm: str, refusal: InvalidInputError | None) -> None:
    """All ranks go on together, or every one of them raises."""
    mine = {"plan": plan.fingerprint, "algorithm": algorithm}
    refused = {"refusal": None if refusal is None else str(refusal)}
    texts = transport.share(json.dumps(mine | refused), "comparing plans")
    if refusal is not None:
        raise refusal
    for rank, theirs in enumerate(json.loads(text) for text in texts):
        if theirs["refusal"] is not None:
            raise PlanMismatchError(
                "plan", expected="one that every rank takes", found=f"rank {rank} refused it", remedy=theirs["refusal"]
            )
        for key, value in mine.items():
            if theirs[key] != value:
                raise PlanMismatchError(
                    f"{key} of rank {rank}",
                    expected=f"that of rank {transport.rank}, {value[:12]}",
                    found=theirs[key][:12],
                    remedy="Give every rank the same plan and algorithm.",
                )


__all__ = [
    "ENGINES",
    "Engine",
    "Handle",
    "attach",
    "check_detached",
    "device_of",
    "engine_of",
    "load_engine",
]
