"""Zero-shot tasks that lm-eval asks of vLLM's server, with a plan and without, beside the same by our simulation.

usage: python benchmarks/lm_eval_in_vllm.py --vllm PYTHON --model FOLDER --data FOLDER [--calibrate TEXT | --plan PLAN]
       [--codec CODEC] [--tasks NAME ...] [--limit N] [--tp N] [--dtype NAME] [--json FILE]

PYTHON, TEXT and PLAN as in_vllm.py has them, --data as tasks.py does; needs lm-eval[api]. One after the other: vLLM's
own sums, vLLM with NARROWCAST_PLAN, the uncompressed model in Transformers, and the plan simulated there. Differences
are over the same items, with their standard errors; `changed`: the share of items whose chosen answer is another.
"""

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reporting
from lm_eval.models.openai_completions import LocalCompletionsAPI
from peers.distributed_llama import BOUND_TO_PARENT
from scoring import planned
from tasks import EXAMPLES

from in_vllm import ENVIRONMENT, KV_CACHE_NBYTES, VERSION, Server, printed
from narrowcast import Plan, attach
from narrowcast.engines import load_engine
from narrowcast.evaluation.tasks import TaskAnswers, TaskSet, answer
from narrowcast.evaluation.tasks.harness import ask
from narrowcast.transport.address import LOOPBACK, listen

IN_VLLM, PLANNED_IN_VLLM, SIMULATED, UNCOMPRESSED = WAYS = "vLLM", "vLLM, plan", "simulated plan", "Transformers"
COSTS = (PLANNED_IN_VLLM, IN_VLLM), (SIMULATED, UNCOMPRESSED)
ENGINES = (PLANNED_IN_VLLM, SIMULATED), (IN_VLLM, UNCOMPRESSED)
MAX_LENGTH = 2048  # of an item
NUM_CONCURRENT = 8
ENDS_WITHIN_S = 60

Row = dict[str, Any]
Answers = Mapping[str, TaskAnswers]


@contextmanager
def serving(python: Path, model: Path, plan: str, tp_size: int, dtype: str, log_path: Path) -> Iterator[Server]:
    """The model served on ranks of one thread each, all on this machine, by the plan beside the log, if any."""
    with listen(LOOPBACK) as probe:
        port = probe.getsockname()[1]
    options = {
        "--tensor-parallel-size": tp_size,
        "--dtype": dtype,
        "--max-model-len": MAX_LENGTH,
        "--max-num-seqs": NUM_CONCURRENT,
        "--kv-cache-memory-bytes": KV_CACHE_NBYTES,
        "--port": port,
    }
    command = [*BOUND_TO_PARENT, python.with_name("vllm"), "serve", model, "--enforce-eager"]
    command += [part for option in options.items() for part in option]
    environment = os.environ | ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment |= {"NARROWCAST_PLAN": plan}
    with log_path.open("w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(list(map(str, command)), env=environment, cwd=log_path.parent, **streams)
    try:
        server = Server(process, f"http://{LOOPBACK}:{port}", log_path)
        server.wait()
        yield server
    finally:
        process.terminate()
        process.wait(ENDS_WITHIN_S)


def answered_by(server: Server, model: Path, tasks: TaskSet) -> Answers:
    lm = LocalCompletionsAPI(
        model=str(model),
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        num_concurrent=NUM_CONCURRENT,
        max_length=MAX_LENGTH,
    )
    return ask(lm, tasks)


def items(answers: Answers) -> Iterator[tuple[str, Sequence[Any]]]:
    """Of each task, and of all."""
    yield from ((name, task.items) for name, task in answers.items())
    yield "all", [item for task in answers.values() for item in task.items]


def accuracies(way: str, answers: Answers) -> Iterator[Row]:
    for task, own in items(answers):
        mean, standard_error = mean_of([float(item.correct) for item in own])
        yield {"task": task, "way": way, "items": len(own), "accuracy": mean, "standard_error": standard_error}


def differences(way: str, base: str, answers: Mapping[str, Answers]) -> Iterator[Row]:
    """Accuracy of `way` less that of `base`."""
    for (task, ours), (_, theirs) in zip(items(answers[way]), items(answers[base]), strict=True):
        pairs = list(zip(ours, theirs, strict=True))
        mean, standard_error = mean_of([float(own.correct) - float(other.correct) for own, other in pairs])
        changed = statistics.mean(float(own.chosen != other.chosen) for own, other in pairs)
        about = {"task": task, "way": way, "less": base}
        yield about | {"difference": mean, "standard_error": standard_error, "changed": changed}


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = reporting.parser(__doc__)
    for name, kind in {"vllm": "PYTHON", "model": "FOLDER", "data": "FOLDER"}.items():
        parser.add_argument(f"--{name}", type=Path, required=True, metavar=kind)
    parser.add_argument("--calibrate", type=Path, metavar="TEXT")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--codec", default="allocated(bits=4)")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa", "lambada_openai"], metavar="NAME")
    parser.add_argument("--limit", type=int, default=150, help="items of each task at most")
    parser.add_argument("--tp", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    asked = parser.parse_args()
    python, folder, path = asked.vllm.absolute(), asked.model.absolute(), asked.json and asked.json.absolute()
    text = asked.calibrate or folder / "calibration.txt"
    plan = Plan.load(asked.plan) if asked.plan else planned(folder, text, tp_size=asked.tp, codec=asked.codec)
    setting: Row = {"vllm": subprocess.check_output([python, "-c", VERSION], text=True).strip(), "model": folder.name}
    name = asked.plan.name if asked.plan else asked.codec
    setting |= {"plan": name, "tp_size": asked.tp, "dtype": asked.dtype, "limit": asked.limit}
    tasks = TaskSet(names=[str(EXAMPLES / f"{name}.yaml") for name in asked.tasks], limit=asked.limit)
    answers: dict[str, Answers] = {}
    os.chdir(asked.data)  # where the tasks look for their data
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as scratch:
        plan.save(Path(scratch, name))
        for way, given in ((IN_VLLM, ""), (PLANNED_IN_VLLM, name)):
            with serving(python, folder, given, asked.tp, asked.dtype, Path(scratch, way)) as server:
                answers[way], said = answered_by(server, folder, tasks), server.said()
    engine = load_engine()
    model, tokenizer = engine.load(folder, dtype=asked.dtype), engine.load_tokenizer(folder)
    answers[UNCOMPRESSED] = answer(model, tokenizer, tasks)
    with attach(model, plan, simulate=True):
        answers[SIMULATED] = answer(model, tokenizer, tasks)
    rows = [row for way in WAYS for row in accuracies(way, answers[way])]
    apart = [row for pair in (*COSTS, *ENGINES) for row in differences(*pair, answers)]
    print(printed(rows), printed(apart), said, sep="\n\n")
    reporting.write(path, **setting, said=said, accuracies=rows, differences=apart)


if __name__ == "__main__":
    main()
