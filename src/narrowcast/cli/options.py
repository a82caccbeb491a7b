"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

import narrowcast
from narrowcast.collectives import ALGORITHMS, NODE_ALGORITHMS
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import KINDS, Experts, Split
from narrowcast.transport import TRANSPORTS

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")]
TensorParallel = Annotated[
    int, typer.Option("--tp", "-tp", "--tensor-parallel-size", min=1, help="Ranks that share each layer.")
]
PipelineParallel = Annotated[
    int, typer.Option("--pp", "-pp", "--pipeline-parallel-size", min=1, help="Stages of layers.")
]
ExpertsOption = Annotated[
    Experts, typer.Option(help="A slice of every expert on each rank; or whole experts, summed or travelled to.")
]
DEFAULT_CODEC = "int4-feature"
CodecOption = Annotated[
    list[str],
    typer.Option(
        metavar="CODEC",
        help=f"One of {', '.join(narrowcast.PRESETS)}, or spelt out, as group(bits=5, size=64); or KIND=CODEC (again "
        f"and again) for one kind of site: {', '.join(KINDS)}, besides the codec of all others. The last two are sent "
        "as they are unless named.",
    ),
]
ReplicateVocabulary = Annotated[
    bool,
    typer.Option(
        "--replicate-vocabulary", help="Real ranks keep all of the embedding and output layer; nothing of them travels."
    ),
]
Device = Annotated[str, typer.Option(help="Where the whole model computes: cpu, cuda, ...")]
PlanOption = Annotated[Path, typer.Option("--plan", help="A plan that calibrate wrote.")]
Real = Annotated[bool, typer.Option("--real", help="On real ranks; without it, simulated in one process.")]
ScoringText = Annotated[Path | None, typer.Option("--text", help="Text to score on; by default MODEL/scoring.txt.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a sequence at most.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a rank before it counts as lost.")]
Algorithm = Annotated[
    str, typer.Option(help=f"How the ranks add up: {', '.join(('auto', *ALGORITHMS, *NODE_ALGORITHMS))}.")
]
TransportOption = Annotated[str, typer.Option("--transport", help=f"What moves the bytes: {', '.join(TRANSPORTS)}.")]


def checked_split(tp_size: int, pp_size: int, experts: Experts) -> Split:
    """What --tp, --pp and --experts say; InvalidInputError for one rank, between which nothing travels."""
    split = Split(tp_size=tp_size, pp_size=pp_size, experts=experts)
    if split.world_size == 1:
        raise InvalidInputError("split", expected="--tp or --pp above 1", found="one rank", remedy="Pass --tp 2, say.")
    return split
