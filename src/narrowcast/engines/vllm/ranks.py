"""The tensor-parallel ranks of vLLM: meeting them, checking that a plan fits, taking the model over."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.distributed import get_tp_group

from narrowcast.codecs import Codec
from narrowcast.engines.agreement import agreed
from narrowcast.engines.identity import NUM_SAMPLES, config_fields
from narrowcast.engines.vllm import layers
from narrowcast.engines.vllm.model import LoadedModel, split_of
from narrowcast.engines.vllm.settings import CODEC, KEY, LOGGER, PLAN, Settings
from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError, PlanMismatchError
from narrowcast.plan import ModelFingerprint
from narrowcast.plan.summary import feedback_in_words
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport, connect_group

logger = logging.getLogger(LOGGER)

STARTING_S = 3600.0  # for which ranks that compile wait for each other; one that dies is noticed at once

T = TypeVar("T")
Samples = Mapping[str, Sequence[str | None]]


class Ranks:
    """The tensor-parallel ranks, connected and asked for the same. What one of them refuses, all refuse."""

    def __init__(self, settings: Settings, vllm_config: Any, device: torch.device) -> None:
        self._settings, self._vllm_config, self._device = settings, vllm_config, device
        # Our mesh takes the way to MASTER_ADDR, as torchrun sets it, where GLOO_SOCKET_IFNAME says nothing.
        os.environ.setdefault("MASTER_ADDR", vllm_config.parallel_config.master_addr)
        group = get_tp_group()
        self._all = TorchDistributedTransport(group.cpu_group)
        try:
            self._agree(lambda: self._check({}))
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
        names = self._agree(lambda: _every(loaded) if plan is None else loaded.served(plan))
        wires = Communicator(self._sites(names), tp=self._tp, pp=None)
        loaded.take_over(names, wires)
        self._tp.timeout_s = STARTING_S
        # Part of the key of vLLM's cache: what was compiled for other sums, or for none, is not for these.
        compiled_for = {f"{KEY} serves": [self._settings.fingerprint, wires.handle]}
        self._vllm_config.additional_config = {**self._vllm_config.additional_config, **compiled_for}
        if self._tp.rank == 0:
            self._tell(names)
        return wires

    def started(self) -> None:
        """From now on a rank that others wait for is lost after a minute."""
        self._tp.timeout_s = DEFAULT_TIMEOUT_S

    def _check(self, samples: Samples) -> None:
        """PlanMismatchError unless the plan is for this model, as far as its samples are known, and split so."""
        plan, config = self._settings.plan, self._vllm_config.model_config.hf_text_config
        if plan is None:
            return
        plan.check_real()
        if (num_stages := self._vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise PlanMismatchError(
                "plan",
                expected="one stage in vLLM, as a plan's feedback goes through all layers",
                found=f"pipeline_parallel_size {num_stages}",
                remedy=f"Leave the pipeline out, or set {CODEC} in place of the plan.",
            )
        every: dict[str, Sequence[str | None]] = dict.fromkeys(plan.model.samples, [None] * NUM_SAMPLES)
        found = ModelFingerprint(config=config_fields(config), samples={**every, **samples})
        plan.check(found, split_of(self._vllm_config))

    def _agree(self, check: Callable[[], T]) -> T:
        """The result of `check` on this rank; raises on all ranks what it raises on any."""
        plan, codec = self._settings.plan, self._settings.codec
        mine = {"plan": "none" if plan is None else plan.fingerprint, "codec": "none" if codec is None else str(codec)}
        try:
            result, refusal = check(), None
        except NarrowcastError as error:
            refusal = error
        refusal = agreed(self._all, mine, refusal)
        if refusal is not None:
            raise refusal
        return result

    def _sites(self, names: Mapping[str, str]) -> Sites:
        plan, codec = self._settings.plan, self._settings.codec
        if plan is None:
            assert codec is not None, "settings have one of the two"
            return Sites(dict.fromkeys(names, (codec,) * 2), (), "auto", self._device)
        codecs = {name: plan.sites[name].codecs for name in names}
        return Sites(codecs, plan.groups, "auto", self._device, chains=plan.feedback, decisions=plan.decisions)

    def _tell(self, names: Mapping[str, str]) -> None:
        plan, codec, name = self._settings.plan, self._settings.codec, self._settings.name
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
        if own := [name for name in plan.sites if name not in names]:
            logger.info("vLLM's own, exact, are %d of the plan's sites, such as %s", len(own), own[0])


def _without_plan(codec: Codec, num_features: int, dtype: torch.dtype) -> Iterator[str]:
    """Sentences on a codec alone: its bytes, that answers were not compared, and why what is lost stays lost."""
    bits = 8 * codec.row_nbytes(num_features) / num_features
    whole = 8 * dtype.itemsize
    yield f"verdict: {bits:.4g} bits a value in place of {whole}, but what answers lose by that nobody has measured"
    yield (
        "depth feedback and the own part exact are off, as there is no plan: which sums go into the residual stream as "
        "they are, and what reads it, narrowcast calibrate finds out by trying"
    )


def _every(loaded: LoadedModel) -> dict[str, str]:
    """All row-parallel layers and mixtures of experts, by vLLM's name; InvalidInputError if there are none."""
    names = {name: name for name, layer in loaded.sums.items() if not layers.is_embedding(layer)}
    if not names:
        raise InvalidInputError(
            type(loaded.model).__name__,
            expected="a model with row-parallel layers of vLLM's",
            found="none",
            remedy="This model is not supported yet.",
        )
    return names
