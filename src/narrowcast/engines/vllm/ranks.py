"""The ranks of vLLM: meeting them, checking that a plan fits, taking the model over."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.distributed import get_tp_group, get_world_group

from narrowcast.codecs import Codec
from narrowcast.engines.agreement import agreed
from narrowcast.engines.identity import NUM_SAMPLES, config_fields
from narrowcast.engines.vllm.model import LoadedModel, split_of
from narrowcast.engines.vllm.settings import CALIBRATE, CODEC, KEY, LOGGER, PLAN, TUNE, Settings
from narrowcast.engines.vllm.tools import Figures, Tools, Watched
from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError, PlanMismatchError
from narrowcast.files import check_writable
from narrowcast.plan import ModelFingerprint, Plan
from narrowcast.plan.summary import feedback_in_words, numbered
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport, connect_group

logger = logging.getLogger(LOGGER)

PROMPT_TOKENS = 512  # of the prompt that the log tells of
STARTING_S = 3600.0  # for which ranks that compile wait for each other; one that dies is noticed at once

T = TypeVar("T")
Samples = Mapping[str, Sequence[str | None]]


class Ranks:
    """All ranks, asked for the same, and those of one stage, connected. What one refuses, all refuse."""

    def __init__(self, settings: Settings, tools: Tools, vllm_config: Any, device: torch.device) -> None:
        self._settings, self._tools, self._vllm_config, self._device = settings, tools, vllm_config, device
        self._begin: Callable[[], None] = lambda: None
        # Our mesh takes the way to MASTER_ADDR, as torchrun sets it, where GLOO_SOCKET_IFNAME says nothing.
        os.environ.setdefault("MASTER_ADDR", vllm_config.parallel_config.master_addr)
        group = get_tp_group()
        self._all = TorchDistributedTransport(get_world_group().cpu_group)
        try:
            self._agree(self._check_start)
        except PeerLostError as error:
            raise InvalidInputError(
                f"rank {', '.join(map(str, error.ranks))}",
                expected="one that narrowcast serves, as this one",
                found=f"none in {self._all.timeout_s:.0f} s",
                remedy=f"Install narrowcast beside its vLLM too, and set {PLAN} or {CODEC} alike on every node.",
            ) from error
        self._tp = connect_group(group.cpu_group if device.type == "cpu" else group.device_group, device=device)

    def take_over(self, model: nn.Module) -> Communicator:
        """Take over this rank's part of a model; the others may load theirs at another speed."""
        self._all.meet("loading the model")
        loaded, plan = LoadedModel.of(model), self._settings.plan
        self._agree(lambda: self._check({} if plan is None else loaded.samples(plan)))
        names = self._agree(lambda: self._names(loaded))
        compiled_for = self._settings.fingerprint  # of the plan as it was given: what is compiled asks for decisions
        self._tune()
        wires = self._wires(names, loaded)
        loaded.take_over(names, wires)
        self._tp.timeout_s = STARTING_S
        # Part of the key of vLLM's cache: what was compiled for other sums, or for none, is not for these.
        key = {f"{KEY} serves": [compiled_for, wires.handle]}
        self._vllm_config.additional_config = {**self._vllm_config.additional_config, **key}
        if self._tp.rank == 0:
            self._tell(names, loaded)
        return wires

    def started(self, sites: Sites, rank: int) -> None:
        """From now on a rank that others wait for is lost after a minute, and what travels is what was asked for.

        It is counted from now on, and told as of `rank` among vLLM's. InvalidInputError if the rank's port is taken.
        """
        self._tp.timeout_s = DEFAULT_TIMEOUT_S
        self._begin()
        sites.forget()
        self._tools.publish(self._figures(sites, rank))

    def _figures(self, sites: Sites, rank: int) -> Figures:
        """Those of a rank in one of vLLM's replicas, by numbers that no other has, nor another port of its machine."""
        parallel, port = self._vllm_config.parallel_config, self._settings.port
        before, before_here = parallel.data_parallel_index, parallel.data_parallel_rank_local or 0
        num_here = parallel.local_world_size
        return Figures(
            report=sites.report,
            plan=self._settings.plan,
            rank=before * parallel.world_size + rank,
            num_ranks=max(parallel.data_parallel_size, before + 1) * parallel.world_size,
            transport=self._tp.name,
            port=None if port is None else port + before_here * num_here + rank % num_here,
        )

    def _check_start(self) -> None:
        self._check({})
        calibrating = self._settings.calibrating
        if calibrating is None:
            return
        self._tools.recipe(calibrating.codec)
        if (split := split_of(self._vllm_config)).pp_size > 1:
            raise InvalidInputError(
                CALIBRATE, expected="tensor-parallel ranks alone", found=str(split), remedy="Leave the pipeline out."
            )
        if self._all.rank == 0:  # which writes it
            if calibrating.path.exists():
                remedy = "Name another, or remove it."
                raise InvalidInputError(
                    CALIBRATE, expected="a file that is not there yet", found=calibrating.path, remedy=remedy
                )
            check_writable(calibrating.path, overwrite=False)

    def _check(self, samples: Samples) -> None:
        """PlanMismatchError unless the plan is for this model, as far as its samples are known, and split so."""
        plan, config = self._settings.plan, self._vllm_config.model_config.hf_text_config
        if plan is None:
            return
        plan.check_real()
        every: dict[str, Sequence[str | None]] = dict.fromkeys(plan.model.samples, [None] * NUM_SAMPLES)
        found = ModelFingerprint(config=config_fields(config), samples={**every, **samples})
        plan.check(found, split_of(self._vllm_config))
        if plan.tp_size == 1:
            raise PlanMismatchError(
                "plan",
                expected="one of tensor-parallel ranks",
                found=f"one of {plan.split} alone: what stages hand on is vLLM's own",
                remedy=f"Leave it out: unset {PLAN}.",
            )

    def _agree(self, check: Callable[[], T]) -> T:
        """The result of `check` on this rank; raises on all ranks what it raises on any."""
        plan, codec = self._settings.plan, self._settings.codec
        mine = {"plan": "none" if plan is None else plan.fingerprint, "codec": "none" if codec is None else str(codec)}
        mine["calibration"] = str(self._settings.calibrating or "none")
        mine["sample_every"] = str(self._settings.sample_every)
        try:
            result, refusal = check(), None
        except NarrowcastError as error:
            refusal = error
        refusal = agreed(self._all, mine, refusal)
        if refusal is not None:
            raise refusal
        return result

    def _tune(self) -> None:
        """Decide for the links between these ranks, if that is asked for: in the settings' plan."""
        plan = self._settings.plan
        if plan is None or not self._settings.tune:
            return
        decisions = self._tools.tune(plan, self._tp, self._vllm_config.model_config.dtype)
        self._settings = replace(self._settings, plan=replace(plan, decisions=decisions))

    def _names(self, loaded: LoadedModel) -> dict[str, str]:
        """vLLM's names of the sums to serve, by a plan's."""
        if self._settings.plan is not None:
            return loaded.served(self._settings.plan)
        every = loaded.coded_alone()
        return loaded.in_plans() if self._settings.calibrating is not None else {name: name for name in every}

    def _wires(self, names: Mapping[str, str], loaded: LoadedModel) -> Communicator:
        calibrating = self._settings.calibrating
        if calibrating is None:
            return Communicator(self._sites(names), tp=self._tp, pp=None)
        watched = Watched(
            sites=list(names),
            model=self._fingerprint(names, loaded),
            split=split_of(self._vllm_config),
            ranks=self._tp,
            device=self._device,
        )
        recipe = self._tools.recipe(calibrating.codec)
        wires, self._begin = self._tools.calibrate(recipe, calibrating.num_tokens, watched, self._write)
        return wires

    def _fingerprint(self, names: Mapping[str, str], loaded: LoadedModel) -> ModelFingerprint:
        """That of the model, of the samples that the ranks know together."""
        texts = self._all.share(json.dumps(loaded.known_samples(names)), "sharing samples")
        config = config_fields(self._vllm_config.model_config.hf_text_config)
        return reduce(
            ModelFingerprint.merged, (ModelFingerprint(config=config, samples=json.loads(text)) for text in texts)
        )

    def _write(self, plan: Plan | InvalidInputError) -> None:
        calibrating = self._settings.calibrating
        assert calibrating is not None, "only who calibrates gets a plan"
        try:
            if isinstance(plan, InvalidInputError):
                raise plan
            plan.save(calibrating.path)
        except InvalidInputError as error:
            logger.error("no plan was made: %s", error)
            return
        logger.info("plan %s written to %s, for %s=%s", plan.fingerprint[:12], calibrating.path, PLAN, calibrating.path)
        logger.info("it lacks %s: narrowcast calibrate finds them", plan.calibration["missing"])

    def _sites(self, names: Mapping[str, str]) -> Sites:
        plan, codec = self._settings.plan, self._settings.codec
        if plan is None:
            assert codec is not None, "settings have one of the two"
            codecs = dict.fromkeys(names, (codec,) * 2)
            return Sites(codecs, (), "auto", self._device, sample_every=self._settings.sample_every)
        return Sites(
            {name: plan.sites[name].codecs for name in names},
            plan.groups,
            "auto",
            self._device,
            chains=plan.feedback,
            decisions=plan.decisions,
            kinds={name: plan.sites[name].kind for name in names},
            expected={name: plan.sites[name].error for name in names},
            sample_every=self._settings.sample_every,
        )

    def _tell(self, names: Mapping[str, str], loaded: LoadedModel) -> None:
        plan, codec, name = self._settings.plan, self._settings.codec, self._settings.name
        calibrating = self._settings.calibrating
        if calibrating is not None:
            logger.info("calibrating %s at %d sums, which are exact; then %s is written", calibrating, len(names), name)
            return
        what = f"codec {name}" if plan is None else f"plan {plan.fingerprint[:12]}, {name},"
        logger.info("%s at %d sums, over %s", what, len(names), self._tp.name)
        if plan is None:
            assert codec is not None, "settings have one of the two"
            config = self._vllm_config.model_config
            for line in _without_plan(codec, config.get_hidden_size(), config.dtype):
                logger.info("%s", line)
            return
        for line in feedback_in_words(plan):
            logger.info("%s", line)
        logger.info("%s", _decided(plan))
        if own := [name for name in plan.sites if name not in names and not loaded.is_elsewhere(name)]:
            logger.info("vLLM's own, exact, are %d of the plan's sites, such as %s", len(own), own[0])


def _decided(plan: Plan) -> str:
    """The way of the plan's sums, of one token and of a prompt."""
    num_features = int(plan.model.config["hidden_size"])
    ways = {tokens: plan.decisions.choice(tokens, num_features, coded=True) for tokens in (1, PROMPT_TOKENS)}
    if None in ways.values():
        return f"not tuned: all sums are coded, also where that is slower; {TUNE}=1 measures it here"
    return "tuned: " + ", ".join(f"sums of {numbered(tokens, 'token')} {way}" for tokens, way in ways.items())


def _without_plan(codec: Codec, num_features: int, dtype: torch.dtype) -> Iterator[str]:
    """Sentences on a codec alone: its bytes, that answers were not compared, and why what is lost stays lost."""
    bits = 8 * codec.row_nbytes(num_features) / num_features
    whole = 8 * dtype.itemsize
    yield f"verdict: {bits:.4g} bits a value in place of {whole}, but what answers lose by that nobody has measured"
    yield (
        "depth feedback and the own part exact are off, as there is no plan: which sums go into the residual stream as "
        "they are, and what reads it, narrowcast calibrate finds out by trying"
    )
