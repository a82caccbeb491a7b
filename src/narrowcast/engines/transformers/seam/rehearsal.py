"""A rehearsal of the engine's pipeline: a small random model in stages, and in one piece, before weights are read.

Transformers 5.23 splits any model with a list `layers`, and finds the other parts by the names that Llama gives them:
stages of a model whose final norm has another name, or that scales what it takes for embeddings, give other logits,
without an error. A list of such models would never be whole.
"""

import copy
import functools
import inspect
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.engines.transformers.seam.pipeline import boundaries, own_layers
from narrowcast.engines.transformers.seam.stage_cache import tell_own_lengths_
from narrowcast.errors import InvalidInputError

logger = logging.getLogger(__name__)

# Numbers in configs, by name, and the most that they are in a small model. Layers stay as many, so that each stage has
# what it will have.
FEW = {
    r"\w*token_id": 1,
    r"\w*vocab_size\w*": 128,
    r"\w*intermediate_size|\w*ffn_(dim|hidden_size)": 64,
    r"(num|moe_num|n)_\w*experts|zero_expert_num": 4,
    r"\w*experts_per_tok(en)?|moe_k|\w*topk": 2,
    r"n_group|topk_group|num_expert_group": 1,
}
# Widths are divided alike, so that they go on fitting together; by less where an architecture cannot be so narrow.
WIDTH = r"\w*(size|dim|rank|width|channels|d_model|d_head|d_ssm|n_embd)"
DIVISORS = 64, 32, 16, 8, 4, 1
MAX_WEIGHTS = 1 << 26  # of a model that is still small

ABOUT_WEIGHTS = "quantization_config", "distributed_config", "dtype"
PARTS = (0, 7), (7, 8), (8, 10)  # of a text: a prompt, and what follows it with a cache
ROUNDING = 1e-3  # of the largest logit, in FP32: sound stages compute the same, and a mistake is as large as logits


def check_stages(model: nn.Module, pp_size: int) -> None:
    """InvalidInputError where the engine's stages of such a model are wrong."""
    if found := mistake(model, pp_size):
        raise InvalidInputError(
            f"pp_size {pp_size}",
            expected="stages that answer as the whole model does",
            found=found,
            remedy="Split this model by tp_size alone: its pipeline in Transformers is wrong.",
        )


def mistake(model: nn.Module, pp_size: int) -> str:
    """The mistake of the engine's stages of a model of this class and config, in words; "" for none.

    Takes a second, once for a config. InvalidInputError for a model that has no such stages.
    """
    boundaries(model, pp_size)
    config = cast(Any, model).config
    fields = {name: value for name, value in config.to_dict().items() if name not in ABOUT_WEIGHTS}
    return _mistake(cast(Any, type(model)), cast(Any, type(config)), json.dumps(fields, default=str), pp_size)


@functools.lru_cache(maxsize=8)
def _mistake(kind: Any, config_kind: Any, config: str, pp_size: int) -> str:
    fields = json.loads(config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), quietly():
        for divisor in DIVISORS:
            try:
                whole = _small(kind, config_kind.from_dict(_smaller(fields, divisor)))
                expected = _logits([whole])
            except Exception as error:  # whatever an architecture raises that is not made for such sizes
                logger.debug("no small %s: %r", kind.__name__, error)
                continue
            if bool(expected.isfinite().all()):
                return _difference(expected, whole, pp_size)
    logger.warning("found no small %s on which to try stages: compare its answers yourself", kind.__name__)
    return ""


def _difference(expected: Tensor, whole: nn.Module, pp_size: int) -> str:
    try:
        off = (_logits(_stages(whole, pp_size)) - expected).abs().max()
    except Exception as error:  # whatever a module raises that is given to others than it knows
        found = f"{type(error).__name__}, {(str(error).splitlines() or ['no more'])[0].rstrip('.')}"
    else:
        largest = expected.abs().max()
        if off <= ROUNDING * largest:
            return ""
        found = f"logits {off:.2g} off those in one piece, of {largest:.2g} at most"
    return f"a small random {type(whole).__name__} in {pp_size} stages of Transformers' own: {found}"


def _smaller(fields: dict[str, Any], divisor: int) -> dict[str, Any]:
    """The fields of a config, of one inside it too, with few and short vectors."""
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            small[name] = _smaller(value, divisor)
        elif type(value) is not int:
            small[name] = value
        elif most := next((most for pattern, most in FEW.items() if re.fullmatch(pattern, name)), 0):
            small[name] = min(value, most)
        else:
            divisible = value % divisor == 0 and re.fullmatch(WIDTH, name)
            small[name] = value // divisor if divisible else value
    return small


def _small(kind: Any, config: Any) -> nn.Module:
    """A random model. ValueError if it is not small."""
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in kind(config).parameters())
    if num_weights > MAX_WEIGHTS:
        raise ValueError(f"{num_weights} weights")
    model: nn.Module = kind._from_config(config, dtype=torch.float32).eval()
    randomize_(model)
    return model


def randomize_(model: nn.Module) -> None:
    """Make weights, norms and biases all random, so that each counts."""
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=random)
        weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)


def _stages(whole: nn.Module, pp_size: int) -> list[nn.Module]:
    """The stages of a model as the engine makes them, that share its weights and run one after the other."""
    from transformers.distributed import pipeline_parallel

    sent: list[Tensor] = []

    class Stage(pipeline_parallel.PipelineStage):  # type: ignore[misc]
        def __init__(self, pp_rank: Any) -> None:
            self.pp_rank, self.pp_size = pp_rank, pp_size
            self.pp_is_first_stage, self.pp_is_last_stage = pp_rank == 0, pp_rank == pp_size - 1

        def communicate(self, operation: str, *, tensor: Tensor | None = None, **_: Any) -> Tensor | None:
            if operation == "recv_forward":
                return None if self.pp_is_first_stage else sent.pop()
            if tensor is not None and not self.pp_is_last_stage:
                sent.append(tensor)
            return None

        def broadcast_from_last(self, tensor: Tensor | None, **_: Any) -> Tensor | None:
            return tensor

    shared = {id(each): each for each in itertools.chain(whole.parameters(), whole.buffers())}
    original = pipeline_parallel.PipelineStage
    pipeline_parallel.PipelineStage = Stage
    try:
        stages = [copy.deepcopy(whole, dict(shared)) for _ in range(pp_size)]
        return [pipeline_parallel.apply_pipeline_parallelism(stage, rank) for rank, stage in enumerate(stages)]
    finally:
        pipeline_parallel.PipelineStage = original


def _logits(stages: Sequence[nn.Module]) -> Tensor:
    """Logits [N, V] of two texts, one padded, continued with a cache as `generate` does; of the last stage."""
    ids = torch.arange(2, 2 + 2 * PARTS[-1][1]).view(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches: list[Any] = [None] * len(stages)
    logits = []
    for start, stop in PARTS:
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        inputs["attention_mask"] = mask[:, :stop]
        for index, stage in enumerate(stages):
            known = inspect.signature(type(stage).forward).parameters
            cache = {} if caches[index] is None else {"past_key_values": caches[index]}
            given = {name: value for name, value in inputs.items() if name in known}
            outputs = cast(Any, stage)(**given, **cache, use_cache=True)
            caches[index] = getattr(outputs, "past_key_values", None)
            if len(stages) > 1:
                tell_own_lengths_(caches[index], own_layers(stage))
        logits.append(outputs.logits[mask[:, start:stop].bool()])
        if caches[-1] is None:
            break
    return torch.cat(logits)


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing is told of a model that nobody asked for."""
    from transformers.utils import logging as engine_logging

    verbosity = engine_logging.get_verbosity()
    engine_logging.set_verbosity_error()
    try:
        yield
    finally:
        engine_logging.set_verbosity(verbosity)
