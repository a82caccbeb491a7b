"""The exceptions, as a tree.

NarrowcastError
├── InvalidInputError (also ValueError)   a user's value cannot be used
│   └── PlanError                         a plan cannot be used
│       ├── PlanFormatError               not a plan, truncated, altered, or of another format version
│       └── PlanMismatchError             made for another model or tp_size, or not the same on every rank
├── PeerLostError (also RuntimeError)     another rank died, hangs, or never came; `ranks` names it
└── MissingDependencyError (also ImportError)

CalibrationWarning (a UserWarning)            too little text, or a few of its tokens leave little of the others
"""

from collections.abc import Sequence


class NarrowcastError(Exception):
    """Base of every error that narrowcast raises on purpose. `exit_status`: that of a command which it ends."""

    exit_status = 1


class InvalidInputError(NarrowcastError, ValueError):
    """A value that cannot be used: says what was expected, what was found, and what to do."""

    def __init__(self, subject: str, *, expected: object, found: object, remedy: str) -> None:
        super().__init__(f"{subject}: expected {expected}, found {found}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by message, so that the error crosses process boundaries whole."""
        return (_rebuild, (type(self), str(self)))


class PlanError(InvalidInputError):
    """A plan that cannot be used."""


class PlanFormatError(PlanError):
    """A file that is not a plan, or is truncated, altered, or of another format version."""


class PlanMismatchError(PlanError):
    """A sound plan for something else: another model, another tp_size, or not the plan of the other ranks."""


class PeerLostError(NarrowcastError, RuntimeError):
    """Other ranks died, hang, or never came. `ranks` are numbers in the whole world, whatever group was at work."""

    def __init__(self, ranks: Sequence[int], doing: str) -> None:
        self.ranks = tuple(ranks)
        self.doing = doing
        names = ", ".join(str(rank) for rank in self.ranks) or "unknown"
        super().__init__(f"lost rank {names} while {doing}")

    def __reduce__(self) -> tuple[object, ...]:
        return (PeerLostError, (self.ranks, self.doing))


class MissingDependencyError(NarrowcastError, ImportError):
    """An optional dependency is not installed: says which command installs it."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{package} is not installed: run pip install 'narrowcast[{extra}]'")

    def __reduce__(self) -> tuple[object, ...]:
        return (MissingDependencyError, (self.package, self.extra))


class CalibrationWarning(UserWarning):
    """A plan that was made from too little text, or that leaves little of most tokens for a few far larger ones."""


def _rebuild(kind: type[InvalidInputError], message: str) -> InvalidInputError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error
