"""Options that several commands have: one name, one meaning, one default."""

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.collectives import ALGORITHMS, NODE_ALGORITHMS
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Experts, Split
from narrowcast.transport import TRANSPORTS

# Groups of options in a command's help, and defaults.
SPLIT, TEXT, RUN, OUTPUT = "Split", "Text", "Run", "Output"
DEFAULT_TP = 2
DEFAULT_CODEC = "int4-feature"
DEFAULT_NUM_SAMPLES = 128

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")]
PlanOption = Annotated[Path, typer.Option("--plan", metavar="FILE", help="A plan that calibrate wrote.")]
TensorParallel = Annotated[
    int,
    typer.Option(
        "-tp", "--tensor-parallel-size", metavar="N", min=1, help="Ranks that share each layer.", rich_help_panel=SPLIT
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        "-pp", "--pipeline-parallel-size", metavar="N", min=1, help="Stages of layers.", rich_help_panel=SPLIT
    ),
]
ExpertsOption = Annotated[
    Experts,
    typer.Option(metavar="NAME", help="slices, all_reduce, all_to_all.", rich_help_panel=SPLIT),
]
CodecOption = Annotated[
    list[str],
    typer.Option(metavar="CODEC", help="See `narrowcast codecs`; or KIND=CODEC.", rich_help_panel=RUN),
]
AlgorithmOption = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"{', '.join(('auto', *ALGORITHMS, *NODE_ALGORITHMS))}.", rich_help_panel=RUN),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", metavar="N", min=1, help="Sequences at most.", rich_help_panel=TEXT)
]
MaxSeqLen = Annotated[
    int, typer.Option("--max-seq-len", metavar="N", min=2, help="Tokens a sequence at most.", rich_help_panel=TEXT)
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Of the whole model.", rich_help_panel=RUN)]
Real = Annotated[bool, typer.Option("--real", help="On real ranks, not simulated.", rich_help_panel=RUN)]
TransportOption = Annotated[
    str,
    typer.Option("--transport", metavar="NAME", help=f"{', '.join(TRANSPORTS)}.", rich_help_panel=RUN),
]
Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0.1, help="Until a rank is lost.", rich_help_panel=RUN),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Figures; replaces an earlier report.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.", rich_help_panel=OUTPUT)
]


def checked_split(tp_size: int, pp_size: int, experts: Experts) -> Split:
    """The split that -tp, -pp and --experts ask for; InvalidInputError for one rank, which has nobody to send to."""
    split = Split(tp_size=tp_size, pp_size=pp_size, experts=experts)
    if split.world_size == 1:
        raise InvalidInputError("split", expected="-tp or -pp above 1", found="one rank", remedy="Pass -tp 2, say.")
    return split
