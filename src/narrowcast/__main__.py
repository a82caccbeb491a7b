"""`narrowcast` and `python -m narrowcast`."""

import sys

from narrowcast.errors import MissingDependencyError, NarrowcastError


def main() -> None:
    """Run the command line; an error is one sentence on stderr and exit status 1."""
    try:
        try:
            from narrowcast.cli import app
        except ModuleNotFoundError as error:
            raise MissingDependencyError(str(error.name), "cli") from error
        app()
    except NarrowcastError as error:
        sys.exit(f"narrowcast: error: {error}")
    except OSError as error:
        sys.exit(f"narrowcast: error: {error.filename or ''}: {error.strerror or error}")


if __name__ == "__main__":
    main()
