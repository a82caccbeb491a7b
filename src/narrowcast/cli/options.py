"""Options that several commands have: one name, one meaning, one default."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from narrowcast.calibration import DEFAULT_TARGET_KL
from narrowcast.collectives import ALGORITHMS, NODE_ALGORITHMS
from narrowcast.engines import Dtype, Weights
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Experts, Split
from narrowcast.runtime.prompts import Chunks
from narrowcast.transport import TRANSPORTS

# Groups of options in a command's help, and defaults.
SPLIT, TEXT, RUN, OUTPUT, SERVER = "Split", "Text", "Run", "Output", "Server"
DEFAULT_TP = 2
DEFAULT_NUM_SAMPLES = 128


def option(group: str, metavar: str | None, help: str, *names: str, **settings: Any) -> Any:
    """An option in a group of the help; its `names`, unless that of the parameter serves."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=group, **settings)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or a GGUF file.")]
PlanOption = Annotated[Path, typer.Option("--plan", metavar="FILE", help="A plan that calibrate wrote.")]
TensorParallel = Annotated[
    int, option(SPLIT, "N", "Ranks that share each layer.", "-tp", "--tensor-parallel-size", min=1)
]
PipelineParallel = Annotated[int, option(SPLIT, "N", "Stages of layers.", "-pp", "--pipeline-parallel-size", min=1)]
ExpertsOption = Annotated[Experts, option(SPLIT, "NAME", "slices, all_reduce, all_to_all.")]
TargetKl = Annotated[
    float | None, option(RUN, "NATS", f"Fewest bits that keep it ({DEFAULT_TARGET_KL:g}).", "--target-kl")
]
Bits = Annotated[float | None, option(RUN, "N", "So many bits a value on average.", "--bits")]
CodecOption = Annotated[list[str], option(RUN, "CODEC", "See `narrowcast codecs`; or KIND=CODEC.")]
AlgorithmOption = Annotated[str, option(RUN, "NAME", f"{', '.join(('auto', *ALGORITHMS, *NODE_ALGORITHMS))}.")]
NumSamples = Annotated[int, option(TEXT, "N", "Sequences at most.", min=1)]
MaxSeqLen = Annotated[int, option(TEXT, "N", "Tokens a sequence at most.", min=2)]
Device = Annotated[str, option(RUN, "NAME", "Of the whole model.")]
DtypeOption = Annotated[Dtype, option(RUN, "NAME", f"{', '.join(get_args(Dtype))}.")]
WeightsOption = Annotated[Weights, option(RUN, "NAME", f"Or {', '.join(get_args(Weights)[1:])}.")]
Real = Annotated[bool, option(RUN, None, "On real ranks, not simulated.", "--real")]
TransportOption = Annotated[str, option(RUN, "NAME", f"{', '.join(TRANSPORTS)}.")]
NoFeedback = Annotated[bool, option(RUN, None, "What a sum loses is lost for good.", "--no-feedback")]
PromptChunks = Annotated[str, option(RUN, "N", "auto, 1, or 2: halves in turns.", "--prompt-chunks")]
Replicate = Annotated[
    Literal["auto", "none", "embedding", "all"], option(RUN, "NAME", "auto, none, embedding, all.", "--replicate")
]
Timeout = Annotated[float, option(RUN, "SECONDS", "Until a rank is lost.", min=0.1)]
Temperature = Annotated[float, option(RUN, "T", "0 for the likeliest tokens.", min=0.0)]
Seed = Annotated[int, option(RUN, "N", "Of the draw, at a temperature.", min=0)]
ApiKey = Annotated[
    str | None, option(SERVER, "TEXT", "Who has it is served.", "--api-key", envvar="NARROWCAST_API_KEY")
]
JsonOption = Annotated[Path | None, option(OUTPUT, "FILE", "Figures; replaces an earlier report.")]
Overwrite = Annotated[bool, option(OUTPUT, None, "Replace what an earlier run wrote.", "--overwrite")]


def prompt_chunks(given: str) -> Chunks:
    """The number that `attach` takes, or auto; InvalidInputError for anything else."""
    chunks: dict[str, Chunks] = {"auto": "auto", "1": 1, "2": 2}
    if given not in chunks:
        raise InvalidInputError("--prompt-chunks", expected=", ".join(chunks), found=given, remedy="Pass 2, say.")
    return chunks[given]


def checked_split(tp_size: int, pp_size: int, experts: Experts) -> Split:
    """The split that -tp, -pp and --experts ask for; InvalidInputError for one rank, which has nobody to send to."""
    split = Split(tp_size=tp_size, pp_size=pp_size, experts=experts)
    if split.world_size == 1:
        raise InvalidInputError("split", expected="-tp or -pp above 1", found="one rank", remedy="Pass -tp 2, say.")
    return split
