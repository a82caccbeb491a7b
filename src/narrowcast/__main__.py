"""`narrowcast` and `python -m narrowcast`."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from narrowcast.errors import MissingDependencyError, NarrowcastError

INTERRUPTED = 130  # what typer exits with after Ctrl-C
TRACEBACK = "NARROWCAST_TRACEBACK"  # set to show where an error came from


def main() -> None:
    """Run the command line; an error is one sentence on stderr and exit status 1."""
    try:
        try:
            with _starting():
                from narrowcast.cli import app
        except ModuleNotFoundError as error:
            raise MissingDependencyError(str(error.name), "cli") from error
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _say_interrupted()
        raise
    except KeyboardInterrupt:  # before typer listens: while modules are imported
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        print(f"narrowcast: error: {_sentence(error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


def _sentence(error: Exception) -> str:
    if isinstance(error, NarrowcastError):
        unexpected = hasattr(error, "__notes__")  # the traceback of a rank that crashed
        return f"{error}{_where() if unexpected else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'standard output'}: {error.strerror}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{_where()}"


def _where() -> str:
    return f" ({TRACEBACK}=1 shows where)"


@contextmanager
def _starting() -> Iterator[None]:
    """A sign of life until commands are imported, where somebody watches."""
    watched = sys.stderr.isatty()
    if watched:
        print("narrowcast: starting", end="\r", file=sys.stderr, flush=True)
    yield
    if watched:
        print("\x1b[K", end="", file=sys.stderr, flush=True)


def _say_interrupted() -> None:
    print("narrowcast: interrupted; no file was left half-written", file=sys.stderr)


if __name__ == "__main__":
    main()
