"""The shape of the package: who may import whom, which names are public, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import narrowcast

SOURCE = Path(narrowcast.__file__).parent

# A module imports only from those above it (docs/architecture.md).
ORDER = [
    "errors",
    "_native",
    "_emulator",
    "files",
    "codecs",
    "transport",
    "collectives",
    "plan",
    "runtime",
    "engines",
    "attach",
    "launch",
    "scores",
    "calibration",
    "rotation",
    "evaluation",
    "perf",
    "cli",
]
ENGINES = {"transformers", "vllm"}
PUBLIC = [
    "PRESETS",
    "InvalidInputError",
    "NarrowcastError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attach",
    "broadcast",
    "calibrate",
    "recv",
    "reduce_scatter",
    "send",
]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_modules_import_only_from_those_above() -> None:
    checked = 0
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        above = ORDER[: ORDER.index(part) + 1]
        for name in imports(path):
            if name.startswith("narrowcast."):
                target = name.split(".")[1]
                public_facade = target in PUBLIC and part == "cli"
                assert target in above or public_facade, f"{path} imports {name}"
                checked += 1
    assert checked > 50


def test_only_its_folder_imports_an_engine() -> None:
    for path in SOURCE.rglob("*.py"):
        engines = {name.split(".")[0] for name in imports(path)} & ENGINES
        assert not engines or path.is_relative_to(SOURCE / "engines" / engines.pop()), path


def test_public_names() -> None:
    """Someone who adds a name here changes what users may rely on: say so in the CHANGELOG."""
    assert narrowcast.__all__ == PUBLIC


def test_importing_is_light() -> None:
    """No engine, no command line, no plots, no CUDA: `import narrowcast` needs torch, numpy and safetensors."""
    code = (
        "import sys, narrowcast, torch;"
        "print({'transformers', 'typer', 'rich', 'matplotlib'} & sys.modules.keys(), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set() False\n"


def test_files_stay_small() -> None:
    """One idea a file: 400 lines at most."""
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf8").splitlines()) <= 400, path
