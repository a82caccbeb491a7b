"""`narrowcast` and `python -m narrowcast`."""

import sys

from narrowcast.errors import MissingDependencyError, NarrowcastError

INTERRUPTED = 130  # what typer exits with after Ctrl-C


def main() -> None:
    """Run the command line; an error is one sentence on stderr and exit status 1."""
    try:
        try:
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
    except NarrowcastError as error:
        print(*getattr(error, "__notes__", ()), sep="", end="", file=sys.stderr)  # the traceback of a rank that crashed
        sys.exit(f"narrowcast: error: {error}")
    except OSError as error:
        sys.exit(f"narrowcast: error: {error.filename or ''}: {error.strerror or error}")


def _say_interrupted() -> None:
    print("narrowcast: interrupted; no file was left half-written", file=sys.stderr)


if __name__ == "__main__":
    main()
