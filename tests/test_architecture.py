"""The shape of the package: who may import whom, which names are public, what importing costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import narrowcast
from narrowcast.collectives import ALGORITHMS, NODE_ALGORITHMS

SOURCE = Path(narrowcast.__file__).parent

ROOT = Path(__file__).parents[1]
COMPILED = "_native", "_emulator"


def modules_in_order() -> list[str]:
    """The first column of the table under "Modules" in docs/architecture.md: the order of imports."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
    table = page.split("## Modules")[1].split("\n## ")[0].split("`csrc/`")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


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


def test_the_page_lists_what_there_is() -> None:
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(modules_in_order()) == there - {"__init__", "__main__"}


def test_modules_import_only_from_those_above() -> None:
    order, checked = modules_in_order(), 0
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for name in imports(path):
            if name.startswith("narrowcast."):
                target = name.split(".")[1]
                above = target in COMPILED or order.index(target) <= order.index(part)
                assert above, f"{path} imports {name}"
                checked += 1
    assert checked > 50


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                assert text.split()[0] not in ("What", "Whether", "Which", "How"), f"{path}: {text.splitlines()[0]}"


def test_no_code_asks_for_an_algorithm_by_name() -> None:
    """What an algorithm is, it says itself: a new one must not be taken for one that we know."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Compare):
                compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                assert not compared & {*ALGORITHMS, *NODE_ALGORITHMS}, f"{path}:{node.lineno}"


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
