"""The modules that get forwards for decoding steps: those of known classes, where a rehearsal finds no difference.

A class of the same name may compute something else in another release: a small random model is asked both ways before.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.codecs.kernels import cpu
from narrowcast.engines.forwards import Bound, Forward, Forwards
from narrowcast.engines.transformers.decoding import layers, recorded
from narrowcast.engines.transformers.decoding.interface import choose
from narrowcast.engines.transformers.seam.rehearsal import ABOUT_WEIGHTS, quietly, randomize_

logger = logging.getLogger(__name__)

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
}
FORWARDS: dict[str, Callable[..., Any]] = {
    "Attention": layers.attention_forward,
    "RMSNorm": layers.norm_forward,
    "MLP": layers.mlp_forward,
    "DecoderLayer": recorded.layer_forward,
}
SMALL = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "sliding_window": 8,
}
ROUNDING = 1e-4  # of the largest logit, in FP32: a mistake is as large as logits


def shorten_steps(model: nn.Module) -> Forwards:
    """Give the modules of a model of a known family forwards for decoding steps; what they had can be restored."""
    forwards = Forwards()
    if cpu.native is None or cast(Any, model).device.type != "cpu" or not any(_known(model)):
        return forwards
    config = cast(Any, model).config
    fields = {name: value for name, value in config.to_dict().items() if name not in (*ABOUT_WEIGHTS, "_name_or_path")}
    if _is_same(cast(Any, type(model)), cast(Any, type(config)), json.dumps(fields, default=str)):
        _replace(model, forwards)
    return forwards


def _replace(model: nn.Module, forwards: Forwards) -> None:
    for module, forward in _known(model):
        forwards.set(module, "forward", Bound(forward, module))  # which copies of the model have for themselves


def _known(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Modules of known classes with the forwards of these, and the ones for steps."""
    table = _classes()
    for module in model.modules():
        if type(module) in table and "forward" not in vars(module):
            yield module, table[type(module)]


def for_steps(module: nn.Module, model: nn.Module) -> Forward | None:
    """The forward for steps of a module that another one stands in the way of; None where `model` has none of ours."""
    forward = _classes().get(type(module))
    is_shortened = any(
        getattr(vars(each).get("forward"), "function", None) in FORWARDS.values() for each in model.modules()
    )
    return None if forward is None or not is_shortened else Bound(forward, module)


def _classes() -> dict[type, Callable[..., Any]]:
    """The classes of the families that were imported."""
    found = {}
    for name, prefix in FAMILIES.items():
        home = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        for kind, forward in FORWARDS.items():
            if (known := getattr(home, prefix + kind, None)) is not None:
                from_one = kind == "RMSNorm" and name.startswith("gemma")
                found[known] = layers.norm_from_one_forward if from_one else forward
    return found


@functools.lru_cache(maxsize=8)
def _is_same(kind: Any, config_kind: Any, config: str) -> bool:
    """True if a small model of this class and config answers alike with its own forwards and with ours."""
    fields = json.loads(config)
    small: dict[str, Any] = {name: value for name, value in SMALL.items() if fields.get(name) is not None}
    small["hidden_size"] = 4 * (fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])
    if fields.get("layer_types"):
        small["layer_types"] = fields["layer_types"][-2:]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), quietly():
            model = kind._from_config(config_kind.from_dict(fields | small), dtype=torch.float32).eval()
            randomize_(model)
            choose(model)
            expected = _logits(model)
            forwards = Forwards()
            _replace(model, forwards)
            off, largest = (_logits(model) - expected).abs().max(), expected.abs().max()
    except Exception as error:  # whatever a class raises that is not made for such sizes, or computes otherwise
        logger.warning("decoding steps of %s are Transformers' own: %r", kind.__name__, error)
        return False
    if same := bool(off <= ROUNDING * largest):
        return same
    logger.warning("decoding steps of %s are Transformers' own: ours are %.2g off", kind.__name__, float(off))
    return False


def _logits(model: Any) -> Tensor:
    """Logits of two texts, one padded, continued as `generate` does."""
    ids = torch.arange(2, 42).view(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions, cache, found = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    for start, stop in ((0, 7), (7, 8), (8, 10), (10, 11), (11, 20)):
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        outputs = model(**inputs, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        found.append(outputs.logits[mask[:, start:stop].bool()])
    return torch.cat(found)
