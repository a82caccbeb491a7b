"""Loading the parts of a model on the ranks that share it, all together."""

from pathlib import Path

from torch import nn

from narrowcast.engines.base import Dtype, Engine, Replicated, Weights
from narrowcast.plan.split import Split
from narrowcast.transport import TorchDistributedTransport
from narrowcast.transport.torch_distributed import hurry_engine


def load_part(
    engine: Engine,
    path: str | Path,
    *,
    split: Split,
    replicated: Replicated = "none",
    dtype: Dtype = "auto",
    weights: Weights = "stored",
) -> nn.Module:
    """This rank's part of a model, as `engine.load` has it, once all ranks have theirs; all of them call this.

    Loading may take any time; PeerLostError names a rank that dies, hangs or fails over it.
    """
    model = TorchDistributedTransport().accompanied(
        lambda: engine.load(path, split=split, replicated=replicated, dtype=dtype, weights=weights),
        "loading the model",
    )
    hurry_engine()
    return model
