"""A baseline: the figures of an earlier run, by sequence, and the conditions under which they were found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.evaluation import Evaluation
from narrowcast.evaluation.verdict import Change, changes
from narrowcast.files import is_report
from narrowcast.scores import Items

WRITE_ONE = "Write one with evaluate --json, or, of a server, with baseline record."


@dataclass(frozen=True)
class Baseline:
    """The report in `path`, as `Evaluation.to_json` gave it, or `scorecard.Record.to_json`."""

    path: Path
    report: Mapping[str, Any]
    figures: Mapping[str, Items]

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """InvalidInputError for what is no report, or none with figures by sequence."""
        if not is_report(path):
            found = "another file" if path.exists() else "no such file"
            raise InvalidInputError(str(path), expected="an earlier report", found=found, remedy=WRITE_ONE)
        report = json.loads(path.read_text(encoding="utf8"))
        try:
            figures = {name: Items.from_json(items) for name, items in report["by_sequence"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            raise InvalidInputError(str(path), expected="figures by sequence", found=found, remedy=WRITE_ONE) from error
        return cls(path, report, figures)

    def check(self, conditions: Mapping[str, Any]) -> None:
        """InvalidInputError unless its figures were found under these conditions, and for more than one sequence."""
        if (number := conditions["num_samples"]) < 2:
            raise InvalidInputError("text", expected="two sequences or more", found=number, remedy="Pass more text.")
        for name, mine in conditions.items():
            if (theirs := self.report.get(name)) != mine:
                raise InvalidInputError(
                    str(self.path),
                    expected=f"figures found under the same conditions, {name} {_short(mine)}",
                    found=_short(theirs),
                    remedy="Score the same model, split and text with the same options, or make another report.",
                )

    def changes(self, found: Evaluation) -> dict[str, Change]:
        """The change of each figure; InvalidInputError unless all were found for the same sequences."""
        self.check({**found.conditions, "reference": found.reference})
        self.check_items(found.score.by_sequence)
        return changes(self.figures, found.score.by_sequence)

    def check_items(self, found: Mapping[str, Items]) -> None:
        """InvalidInputError unless each of its figures was found for the same sequences."""
        for name, items in self.figures.items():
            if name not in found or found[name].weights != items.weights:
                other = "other items" if name in found else "none"
                raise InvalidInputError(
                    str(self.path), expected=f"items of {name} as scored", found=other, remedy=WRITE_ONE
                )


def _short(value: object) -> str:
    """A condition in a sentence: of a digest, enough to tell it from another."""
    return str(value)[:12] if value is not None else "none"
