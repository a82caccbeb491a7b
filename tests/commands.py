"""Commands run in this process: as the user types them, without a Python of their own."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from typer.testing import CliRunner, Result

from conftest import MODEL
from narrowcast import Plan, calibrate
from narrowcast.__main__ import main
from narrowcast.calibration.text import sequences
from narrowcast.cli import app
from narrowcast.engines import load_engine


def run(*arguments: object, status: int = 0) -> str:
    """What a command prints, which must end with `status`."""
    result = _result(*arguments)
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def refused(*arguments: object) -> str:
    """The error that a command raises, which the user sees as one sentence."""
    result = _result(*arguments)
    assert type(result.exception).__module__ == "narrowcast.errors", repr(result.exception)
    return str(result.exception)


def typed(*arguments: object) -> CompletedProcess[str]:
    """Run `narrowcast` with these arguments as if it were a process: what it prints, and its exit status."""
    command = ["narrowcast", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, COLUMNS="80"),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            print("" if isinstance(end.code, int | None) else end.code, file=err)
    return CompletedProcess(command, status, out.getvalue(), err.getvalue())


def save_plan(path: Path, codec: str) -> Path:
    """A plan for the bundled model over two ranks."""
    engine = load_engine()
    text = sequences(engine.load_tokenizer(MODEL), MODEL / "calibration.txt", length=64, limit=4)
    plan: Plan = calibrate(engine.load(MODEL, dtype="float32"), text, tp_size=2, codec=codec)
    plan.save(path)
    return path


def _result(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(map(str, arguments)))
