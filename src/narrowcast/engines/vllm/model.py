"""A model that vLLM has loaded: its layout, its fingerprint, where a plan's names are in it, and taking it over."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from torch import nn

from narrowcast.engines.forwards import Forwards
from narrowcast.engines.identity import EMBEDDING, NUM_SAMPLES, digest, sample_places
from narrowcast.engines.vllm import layers
from narrowcast.errors import InvalidInputError, PlanMismatchError
from narrowcast.plan import Plan
from narrowcast.plan.split import SUMS, Split
from narrowcast.runtime.wires import Wires


def split_of(vllm_config: Any) -> Split:
    """The layout that vLLM was asked for."""
    parallel = vllm_config.parallel_config
    return Split(
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        experts="all_reduce" if parallel.enable_expert_parallel else "slices",
    )


@dataclass(frozen=True)
class LoadedModel:
    """A rank's part of a model. `sums`: by vLLM's name, its layers whose sums can be served, the embedding too."""

    model: nn.Module
    sums: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The model, as vLLM has loaded it."""
        return cls(model, layers.summing(model))

    def name(self, planned: str) -> str:
        """vLLM's name of a module that the plan knows by the checkpoint's; several of these may be one in vLLM."""
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapped = None if mapper is None else mapper.map_name(f"{planned}.weight")
        name = planned if mapped is None else str(mapped).removesuffix(".weight")
        block, _, last = name.rpartition(".mlp.")
        if last == "experts" and name not in self.sums:  # Transformers' name; checkpoints of Mixtral have another
            return next((each for each, layer in self.sums.items() if _is_in(block, each, layer)), name)
        return name

    def coded_alone(self) -> list[str]:
        """All row-parallel layers and mixtures of experts; InvalidInputError if there are none."""
        found = [name for name, layer in self.sums.items() if not layers.is_embedding(layer)]
        if not found:
            raise InvalidInputError(
                type(self.model).__name__,
                expected="a model with row-parallel layers of vLLM's",
                found="none",
                remedy="This model is not supported yet.",
            )
        return found

    def in_plans(self) -> dict[str, str]:
        """All sums but the embedding's, by names under which a plan can know them: the checkpoint's, or vLLM's."""
        sums = [name for name, layer in self.sums.items() if not layers.is_embedding(layer)]
        return {self._planned(name): name for name in sums}

    def _planned(self, name: str) -> str:
        before: list[str]
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        prefixes = {} if mapper is None else mapper.orig_to_new_prefix
        before = [old + name.removeprefix(new) for old, new in prefixes.items() if new and name.startswith(new)]
        for each in (*before, name):
            if self.name(each) == name:
                return each
        raise InvalidInputError(
            type(self.model).__name__,
            expected="names that follow from the checkpoint's",
            found=name,
            remedy="This model cannot be calibrated in vLLM yet.",
        )

    def known_samples(self, names: Mapping[str, str]) -> dict[str, list[str | None]]:
        """Digests by the plan's names, those that a rank may know: not of experts, nor of weights in few bits."""
        known = [
            planned for planned, name in names.items() if getattr(layers.unwrapped(self.sums[name]), "samples", {})
        ]
        return {planned: self._samples(planned) for planned in (*known, EMBEDDING)}

    def samples(self, plan: Plan) -> dict[str, list[str | None]]:
        """Digests by the plan's names, those that this rank knows of the plan's."""
        return {name: self._samples(name) for name in plan.model.samples}

    def _samples(self, planned: str) -> list[str | None]:
        if planned == EMBEDDING:
            embeddings = [layers.unwrapped(layer) for layer in self.sums.values() if layers.is_embedding(layer)]
            return _rows(embeddings[0]) if embeddings else [None] * NUM_SAMPLES
        layer: Any = layers.unwrapped(self.sums.get(self.name(planned), nn.Identity()))
        held = getattr(layer, "samples", {})
        return [held.get(place) for place in sample_places(layer.input_size)] if held else [None] * NUM_SAMPLES

    def served(self, plan: Plan) -> dict[str, str]:
        """vLLM's names of the plan's sums, by the plan's, those of this stage.

        Where a mixture of experts has shared ones, vLLM sums both at once, itself.
        PlanMismatchError if the plan names what the model does not have, or a chain of it leads into another stage.
        """
        self._check_stages(plan)
        sums = {name: self.name(name) for name, site in plan.sites.items() if site.kind in SUMS}
        served = {planned: name for planned, name in sums.items() if name in self.sums}
        there = dict(self.model.named_modules())
        mixed = any(map(layers.is_experts, there.values()))
        readers = () if plan.feedback.unread else plan.feedback.readers.items()
        read = [name for norm, reader in readers for name in (norm, *reader.modules)]
        missing = [planned for planned in sums if planned not in served and not mixed]
        missing += [planned for planned in read if self.name(planned) not in there]
        missing = [planned for planned in missing if not self.is_elsewhere(planned)]
        if missing:
            raise PlanMismatchError(
                "plan",
                expected=f"modules of this model, such as {next(iter(self.sums), 'none')}",
                found=missing[0],
                remedy="Calibrate this model.",
            )
        return served

    def _check_stages(self, plan: Plan) -> None:
        for chain in plan.feedback.chains:
            elsewhere = [site for site in chain if self.is_elsewhere(site)]
            if 0 < len(elsewhere) < len(chain):
                raise PlanMismatchError(
                    "plan",
                    expected=f"stages that end where its chains of feedback do, such as at {chain[-1]}",
                    found=f"{elsewhere[0]} and other sums of its chain in different ones",
                    remedy="Set VLLM_PP_LAYER_PARTITION to layers by stage as the plan has them.",
                )

    def is_elsewhere(self, planned: str) -> bool:
        """True for a module of another stage, by the plan's name."""
        return f"{self.name(planned)}.".startswith(self._elsewhere)

    @cached_property
    def _elsewhere(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name, module in self.model.named_modules() if layers.is_elsewhere(module))

    def take_over(self, names: Mapping[str, str], wires: Wires) -> Forwards:
        """Send the sums over `wires`: by the plan's names those that `names` has, as they are all others."""
        forwards, planned = Forwards(), {name: planned for planned, name in names.items()}
        for name, layer in self.sums.items():
            if layers.is_embedding(layer):
                layers.look_up(planned.get(name, name), layer, wires, forwards)
            elif name in planned:
                give = layers.sum_experts if layers.is_experts(layer) else layers.sum_rows
                give(planned[name], layer, wires, forwards)
        modules = dict(self.model.named_modules())
        for norm, reader in wires.feedback.readers.items():
            if self.name(norm) not in modules:  # of another stage
                continue
            layers.read_stream(norm, modules[self.name(norm)], wires, forwards)
            for name, module in {self.name(module): module for module in reader.modules}.items():
                if not layers.is_experts(modules[name]):  # which read it where they are summed
                    layers.keep_columns(module, modules[name], wires, forwards)
        return forwards


def _is_in(block: str, name: str, layer: nn.Module) -> bool:
    return layers.is_experts(layer) and name.startswith(f"{block}.")


def _rows(embedding: Any) -> list[str | None]:
    """Digests of this rank's rows among the sampled ones."""
    shard, weight = embedding.shard_indices, embedding.weight
    own = range(shard.org_vocab_start_index, shard.org_vocab_end_index)
    places = sample_places(embedding.org_vocab_size)
    return [digest(weight[place - own.start]) if place in own else None for place in places]
