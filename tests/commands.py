"""Commands run in this process: as the user types them, without a Python of their own."""

from pathlib import Path

from typer.testing import CliRunner, Result

from conftest import MODEL
from narrowcast import Plan, calibrate
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


def save_plan(path: Path, codec: str) -> Path:
    """A plan for the bundled model over two ranks."""
    engine = load_engine()
    text = sequences(engine.load_tokenizer(MODEL), MODEL / "calibration.txt", length=64, limit=4)
    plan: Plan = calibrate(engine.load(MODEL), text, tp_size=2, codec=codec)
    plan.save(path)
    return path


def _result(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(map(str, arguments)))
