"""Loading models and tokenizers, whole or this rank's part."""

import importlib.util
import io
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from narrowcast.engines.base import Dtype, Replicated, Weights
from narrowcast.engines.layered import by_layer, in_words
from narrowcast.engines.transformers.decoding import choose, shorten_steps
from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.engines.transformers.files.claims import check_counts, check_shapes
from narrowcast.engines.transformers.files.gguf_metadata import quick_metadata
from narrowcast.engines.transformers.files.gguf_model import completed, knows
from narrowcast.engines.transformers.files.packed import PackedModel
from narrowcast.engines.transformers.files.settling import settle
from narrowcast.engines.transformers.files.vocabulary import styles
from narrowcast.engines.transformers.seam import OWN_COLUMNS
from narrowcast.engines.transformers.seam.rehearsal import check_stages, mistake
from narrowcast.engines.transformers.sharding import check_dense
from narrowcast.errors import InvalidInputError, MissingDependencyError, NarrowcastError
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, tell
from narrowcast.weights.folders.tensors import INDEX, SINGLE, Tensors
from narrowcast.weights.layers import DenseLinear

logger = logging.getLogger(__name__)

WHOLE = Split()
GGUF = ".gguf"
CONFIG = "config.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZERS = "tokenizer*", "*.model", "vocab*"


def load(
    path: str | Path,
    *,
    split: Split = WHOLE,
    replicated: Replicated = "none",
    device: str | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "stored",
) -> nn.Module:
    """The causal LM of `path`; with a `split`, what this rank of torch.distributed holds of it.

    `path`: a folder, a hub name, or a GGUF file. `dtype`: of weights and what is computed with them; "auto" takes the
    one that they are stored in, BF16 beside weights in few bits.
    `weights`: what is stored in few bits (GGUF; AWQ, GPTQ and W4A16 folders) stays so with "stored", and becomes values
    of `dtype` with "dense"; "int4-group32" and "int8-group32" make matrices such that are stored as values.
    `replicated`: of the vocabulary, what each rank keeps whole, and of which nothing travels then: the "embedding", or
    "all", the output layer too. Where both are one matrix, "embedding" still shares out the product with it. A whole
    model goes to `device`; where a part goes, Transformers decides.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a rank would garble the screen
    tell(Progress(f"loading {path}"))
    located = _located(path)
    with told(path):
        if split == WHOLE:
            _check_device(device)
            if (packed := packed_model(path, weights)) is not None:
                if weights != "dense":
                    _check_computes_on_cpu(path, device)
                return _quick_in_steps(packed.load(config_of(path), _activations(dtype)).to(device))
            with _hushed(path):
                model = _from_pretrained(path, located | _weights(path, dtype))
            model = model.to(device)
            settle(model)
            return _quick_in_steps(model)
        _check_version(split, replicated)
        _check_divisible(config_of(path).get_text_config(), split)
        if split.pp_size > 1:
            check_stages(skeleton(path), split.pp_size)
        packed = packed_model(path, weights)
        with _stages_may_be_split() if split.pp_size > 1 else nullcontext(), _hushed(path):
            distributed = {"distributed_config": _distributed_config(split, path, replicated)}
            if packed is not None:
                model = packed.load(config_of(path), _activations(dtype), **distributed)
            else:
                model = _from_pretrained(path, located | _weights(path, dtype) | distributed)
                settle(model)
        return _quick_in_steps(model)


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Errors of Transformers, safetensors and PyTorch, as files can be wrong in many ways, in a sentence."""
    try:
        yield
    except NarrowcastError:
        raise
    except ImportError as error:  # splitting a model needs accelerate besides
        raise MissingDependencyError(error.name or "accelerate", "transformers") from error
    except Exception as error:
        raise _not_loaded(path, error) from error


def _quick_in_steps(model: nn.Module) -> nn.Module:
    """Make steps of few tokens quick: linear layers (`attach` sees to split ones), attention, what is in between."""
    choose(model)
    shorten_steps(model)
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.__class__ = DenseLinear
    return model


def _from_pretrained(path: str | Path, arguments: Mapping[str, Any]) -> nn.Module:
    """The model; InvalidInputError if weights are missing, in whose place there would be random ones."""
    from transformers import AutoModelForCausalLM

    if any((Path(path) / file).is_file() for file in (SINGLE, INDEX)):
        tensors = Tensors(Path(path))
        check_shapes(path, skeleton(path), tensors.names, tensors.shape)
    model, about = AutoModelForCausalLM.from_pretrained(**arguments, output_loading_info=True)
    if missing := sorted(about["missing_keys"]):
        raise InvalidInputError(
            f"model {path}",
            expected="all weights of its config",
            found=f"none for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            remedy="Copy or download it again.",
        )
    return cast(nn.Module, model)


def packed_model(path: str | Path, weights: Weights) -> PackedModel | None:
    """The model's weights, where they are read by us; None for the engine."""
    if not reads_itself(path, weights):
        return None
    checkpoint = open_checkpoint(folder_of(path))
    for note in checkpoint.notes:
        logger.info("%s: %s", path, note)
    return PackedModel(path, checkpoint, weights)


def reads_itself(path: str | Path, weights: Weights) -> bool:
    """True where weights are read by us, and not by the engine: stored in few bits, or to be kept so."""
    if Path(path).suffix == GGUF:
        return knows(Path(path)) or weights not in ("stored", "dense")
    quantized = getattr(config_of(path), "quantization_config", None) is not None
    return quantized or weights not in ("stored", "dense")


def config_of(path: str | Path) -> Any:
    """The model's config."""
    from transformers import AutoConfig

    located = _located(path)
    with _metadata(path):
        config = AutoConfig.from_pretrained(**located)
    return completed(config, Path(path)) if Path(path).suffix == GGUF else config


def _metadata(path: str | Path) -> AbstractContextManager[None]:
    """Of a GGUF file, what makes its config and tokenizer quick to read; its header is checked first."""
    if Path(path).suffix != GGUF:
        return nullcontext()
    knows(Path(path))
    return quick_metadata()


def folder_of(path: str | Path) -> Path:
    """The files of a model at a path, or of a hub name."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))


def _activations(dtype: Dtype) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def _check_computes_on_cpu(path: str | Path, device: str | None) -> None:
    if torch.device(device or "cpu").type != "cpu":
        raise InvalidInputError(
            f"model {path}",
            expected="the CPU, where weights in few bits are computed with",
            found=f"device {device}",
            remedy='Load it with weights="dense".',
        )


def save(model: nn.Module, path: str | Path) -> None:
    """Write a whole model, with its config, into folder `path`, for `load` and for plain Transformers.

    InvalidInputError for a model whose weights are in few bits.
    """
    from transformers.utils import logging

    check_dense("model to save", model)

    logging.disable_progress_bar()
    cast(Any, model).save_pretrained(path)


def skeleton(path: str | Path) -> nn.Module:
    """The causal LM of `path` on the meta device: its config is all that is read."""
    from transformers import AutoModelForCausalLM

    with told(path):
        config = config_of(path)
        with torch.device("meta"):
            return cast(nn.Module, AutoModelForCausalLM.from_config(config))


def _located(path: str | Path) -> dict[str, Any]:
    """The arguments by which Transformers finds a model: a GGUF file is one in a folder.

    InvalidInputError for a path at which there is no model, which Transformers would look for at the hub.
    """
    place = Path(path)
    if place.suffix == GGUF:
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError("gguf", "gguf")
        if not place.is_file():
            raise _no_model(path, "no such file")
        return {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    if place.is_file():
        raise _no_model(path, "a file that is not GGUF's")
    if place.is_dir():
        if not (place / CONFIG).is_file():
            raise _no_model(path, f"a folder without {CONFIG}")
        check_counts(place / CONFIG)
    if not place.is_dir() and not HUB_NAME.fullmatch(str(path)):
        raise _no_model(path, "no such folder")
    return {"pretrained_model_name_or_path": path}


def _no_model(path: str | Path, found: str) -> InvalidInputError:
    return InvalidInputError(
        f"model {path}", expected="a model's folder, hub name or GGUF file", found=found, remedy="Check the path."
    )


def _weights(path: str | Path, dtype: Dtype) -> dict[str, Any]:
    """The arguments that say in which dtype weights are wanted, and unpack those of a GGUF file."""
    if Path(path).suffix != GGUF:
        return {"dtype": dtype}
    from transformers import GgufConfig

    unpacked = "bfloat16" if dtype == "auto" else dtype
    return {"dtype": unpacked, "quantization_config": GgufConfig(dequantize=True)}


def _hushed(path: str | Path) -> AbstractContextManager[Any]:
    """No bar for each rank that unpacks a file: the engine has no switch for that one."""
    return redirect_stderr(io.StringIO()) if Path(path).suffix == GGUF else nullcontext()


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise InvalidInputError(
            f"device {device}",
            expected="one that this PyTorch can use",
            found=str(error).strip().splitlines()[0].rstrip("."),
            remedy="Use cpu, or install another build of PyTorch.",
        ) from error


def _check_version(split: Split, replicated: Replicated) -> None:
    """Refuse older releases where 5.20 has other interfaces, or none: only 5.23 was tried."""
    import transformers

    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    new = split.experts != "slices" or min(split.tp_size, split.pp_size) > 1 or replicated != "none"
    if new and release < (5, 23):
        raise InvalidInputError(
            f"{split}, of the vocabulary replicated: {replicated}",
            expected="Transformers 5.23",
            found=transformers.__version__,
            remedy="Run pip install 'transformers>=5.23', or split by tp_size or pp_size alone.",
        )


def _distributed_config(split: Split, path: str | Path, replicated: Replicated) -> Any:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    options: dict[str, Any] = {"tp_size": split.tp_size}
    if split.pp_size > 1:
        options["pp_size"] = split.pp_size
    if split.experts != "slices":
        options |= {"ep_size": split.tp_size, "ep_implementation": split.experts}
    if replicated != "none" and (kept := styles(skeleton(path), replicated)):
        ALL_PARALLEL_STYLES.register(OWN_COLUMNS, ALL_PARALLEL_STYLES["replicate"])
        options["tp_plan"] = kept
    return DistributedConfig(**options)


@contextmanager
def _stages_may_be_split() -> Iterator[None]:
    """Transformers 5.23 fails on modules of other stages, which its tensor-parallel plan names all the same."""
    from transformers.distributed import mixin

    original = mixin.apply_tensor_parallelism

    def only_what_is_here(model: nn.Module, mesh: Any, plan: dict[str, str]) -> nn.Module:
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        here = {
            name: style
            for name, style in plan.items()
            if name in parameters or (name in modules and type(modules[name]).__name__ != "PipelineIdentityLayer")
        }
        return cast(nn.Module, original(model, mesh, here))

    mixin.apply_tensor_parallelism = only_what_is_here
    try:
        yield
    finally:
        mixin.apply_tensor_parallelism = original


def obstacle(model: nn.Module, split: Split) -> str:
    """The heads or experts of a whole model, or of its skeleton, that cannot be shared out so; stages that are wrong.

    InvalidInputError for a model without such stages.
    """
    of_heads = _heads_in_the_way(cast(Any, model).config.get_text_config(), split)
    of_stages = mistake(model, split.pp_size) if split.pp_size > 1 else ""
    return "; ".join(filter(None, (of_heads, of_stages)))


def _heads_in_the_way(config: Any, split: Split) -> str:
    """Transformers splits by whole heads and experts, and fails deep inside where that cannot be."""
    plan = config.base_model_tp_plan or {}
    by_heads = any(name.endswith(("q_proj", "k_proj")) and style == "colwise" for name, style in plan.items())
    fields = {"num_attention_heads": "heads", "num_key_value_heads": "KV heads"} if by_heads else {}
    if split.experts != "slices":
        fields |= {"num_local_experts": "experts", "num_experts": "experts"}
    numbers = {name: by_layer(config, field) for field, name in fields.items()}
    shared = math.gcd(*filter(None, itertools.chain(*numbers.values())))
    if not shared or shared % split.tp_size == 0:
        return ""
    *few, most = (str(size) for size in range(1, shared + 1) if shared % size == 0)
    fitting = f"{', '.join(few)} or {most} ranks" if few else "1 rank"
    return f"{in_words(numbers)}: {fitting}"


def _check_divisible(config: Any, split: Split) -> None:
    if found := _heads_in_the_way(config, split):
        raise InvalidInputError(
            f"tp_size {split.tp_size}",
            expected="ranks that have as many each",
            found=found,
            remedy="Choose another tp_size" + ("; simulation takes any." if split.experts == "slices" else "."),
        )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    located = _located(path)
    tell(Progress(f"reading the tokenizer of {path}"))
    try:
        with _metadata(path):
            return AutoTokenizer.from_pretrained(**located)
    except NarrowcastError:
        raise
    except Exception as error:
        if not Path(path).is_dir() or any(file for pattern in TOKENIZERS for file in Path(path).glob(pattern)):
            raise _not_loaded(path, error) from error
        raise InvalidInputError(
            f"model {path}",
            expected="a tokenizer beside the weights, such as tokenizer.json",
            found="none",
            remedy="Copy it into the folder.",
        ) from error


def _not_loaded(path: str | Path, error: Exception) -> InvalidInputError:
    """The words that Transformers has for a model that is there, or of the hub."""
    (reason, *_) = str(error).strip().splitlines() or [type(error).__name__]
    whole = isinstance(error, OSError | ValueError)
    return InvalidInputError(
        f"model {path}",
        expected="one that Transformers can load" if Path(path).exists() else "a folder, or a name that the hub knows",
        found=(reason if whole else f"{type(error).__name__}: {reason}").rstrip("."),
        remedy="Copy or download it again." if Path(path).exists() else "Check the name; offline, pass a folder.",
    )
