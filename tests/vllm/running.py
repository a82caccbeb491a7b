"""Runs of vLLM as a user starts it, and of the ordinary environment, each in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ORDINARY = HERE.parents[1] / ".venv" / "bin" / "python"
MODEL = str(HERE.parents[1] / "models" / "gutenberg-7m")
EMBEDDING = "model.embed_tokens"
LIMIT_S = 300

# Products in FP32 that are summed in another order put log-probabilities some 1e-6 apart. Where that makes a coded
# value one level more, the token, and those that attend to it, are apart by a part of what coding costs.
ROUNDING = 1e-4

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # as it asks for, for two ranks on one NUMA node
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that record sums
}
PROMPTS = [[(7 * place + 13 * length) % 500 + 5 for place in range(length)] for length in (41, 6, 1)]


def ordinary(command: str, folder: Path, *more: str) -> None:
    """Run a part of ordinary.py."""
    if not ORDINARY.exists():
        pytest.skip(f"needs {ORDINARY}: make test-vllm prepares it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [ORDINARY, HERE / "ordinary.py", command, folder, *more], check=True, timeout=LIMIT_S, env=environment
    )


@dataclass(frozen=True)
class Run:
    """A run of serving.py that went well. `out`: its answers; recorded sums are in files beside."""

    out: Path
    log: str

    @property
    def answers(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    @property
    def scores(self) -> list[float]:
        return [score for each in self.answers["scores"] for score in each]


def started(folder: Path, name: str, asked: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[int, Run]:
    """The exit code of serving.py, asked for that, and what it left."""
    out = folder / f"{name}.json"
    (folder / f"{name}.asked").write_text(json.dumps({"prompts": PROMPTS, **asked}))
    command: Sequence[Any] = [sys.executable, HERE / "serving.py", folder / f"{name}.asked", out]
    cache = {"VLLM_CACHE_ROOT": str(folder / "cache")}  # one for all runs
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | cache | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, Run(out, done.stdout)


def run(folder: Path, name: str, asked: Mapping[str, Any], **environment: str) -> Run:
    """A run that must go well."""
    code, found = started(folder, name, asked, environment)
    assert code == 0, found.log[-4000:]
    return found


def differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Between log-probabilities."""
    return [abs(mine - theirs) for mine, theirs in zip(left, right, strict=True)]


def share_alike(differences: Sequence[float]) -> float:
    """The share of those that are rounding."""
    return sum(each < ROUNDING for each in differences) / len(differences)


def simulated(served: Run, folder: Path, plan: str = "int4.plan", model: str = MODEL) -> dict[str, list[float]]:
    """Log-probabilities of what was served, by our Transformers engine."""
    answered = zip(PROMPTS, served.answers["tokens"], strict=True)
    (folder / "sequences.json").write_text(json.dumps([prompt + tokens for prompt, tokens in answered]))
    ordinary("simulate", folder, model, str(folder / plan))
    found: dict[str, Any] = json.loads((folder / "simulated.json").read_text())
    return {name: [score for each in scores for score in each] for name, scores in found.items()}
