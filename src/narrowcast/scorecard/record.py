"""A record: what came of a workload at a server, as a baseline keeps it."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import Baseline
from narrowcast.progress import Progress, tell
from narrowcast.scorecard.figures import FIGURES, FIRST, MACHINE, NLL, SENT
from narrowcast.scorecard.metrics import Metrics
from narrowcast.scorecard.quality import characters_per_token, scored
from narrowcast.scorecard.rounds import by_figure, speed_of_round
from narrowcast.scorecard.subject import Subject
from narrowcast.scorecard.workload import Workload
from narrowcast.scorecard.yardstick import machine_ms
from narrowcast.scores import Items
from narrowcast.serving.remote import AnswerError

NOT_TOLD = 200, 400, 404, 405, 422, 501  # HTTP: this server does no such thing, and would not at another time


@dataclass(frozen=True, kw_only=True)
class Record:
    """Figures of a server's first `model`: of speed and bytes by round, of quality by text.

    `about`: what is known of server, plan and hardware. `unknown`: by figure, the reason why it is not there.
    """

    model: str
    workload: Workload
    characters_per_token: float
    about: Mapping[str, str]
    by_round: Mapping[str, tuple[float, ...]]
    by_sequence: Mapping[str, Items]
    unknown: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, baseline: Baseline) -> Self:
        """The record in a baseline; InvalidInputError for one of another command."""
        report = baseline.report
        try:
            return cls(
                model=report["model"],
                workload=Workload.from_json(report["workload"]),
                characters_per_token=report["characters_per_token"],
                about=dict(report["about"]),
                by_round={name: tuple(map(float, rounds)) for name, rounds in report["by_round"].items()},
                by_sequence=baseline.figures,
                unknown=dict(report["unknown"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                str(baseline.path),
                expected="a baseline of a server",
                found="another report",
                remedy="Write one with baseline record.",
            ) from error

    @property
    def first_token_s(self) -> float:
        """Mean seconds until the first token."""
        return statistics.mean(self.by_round[FIRST]) / 1e3

    def __str__(self) -> str:
        """Medians, on one line."""
        figures = {name: items.mean for name, items in self.by_sequence.items()}
        figures |= {name: statistics.median(rounds) for name, rounds in self.by_round.items() if name != MACHINE}
        left_out = "".join(f"; no {FIGURES[name].title}: {why}" for name, why in self.unknown.items())
        said = (f"{FIGURES[name].title} {FIGURES[name].form.format(value)}" for name, value in figures.items())
        return f"{self.model}: {'; '.join(said)}{left_out}"

    def to_json(self) -> dict[str, Any]:
        """JSON values: a report that `Baseline.load` reads."""
        return {
            "model": self.model,
            "characters_per_token": self.characters_per_token,
            "num_samples": len(self.workload.texts),
            "workload": self.workload.to_json(),
            "about": dict(self.about),
            "by_round": {name: list(rounds) for name, rounds in self.by_round.items()},
            "by_sequence": {name: asdict(items) for name, items in self.by_sequence.items()},
            "unknown": dict(self.unknown),
        }


def measured(subject: Subject, workload: Workload, baseline: Baseline | None = None) -> Record:
    """Do the work: score texts, then a round to warm up and all others.

    `baseline`: with which it is to be compared; InvalidInputError before the work where that is of another model or
    tokenizer. Where the server does not tell log-probabilities or bytes, these are left out, with the reason.
    """
    api, model, scenario = subject.api, subject.model, workload.scenario
    per_token = characters_per_token(api, model)
    if baseline is not None:
        conditions = {"model": model, "characters_per_token": per_token, "num_samples": len(workload.texts)}
        baseline.check(conditions)
    unknown, by_sequence = {}, {}
    try:
        by_sequence[NLL] = scored(api, model, workload.texts)
        if baseline is not None:
            baseline.check_items(by_sequence)
    except AnswerError as error:
        if error.status not in NOT_TOLD:
            raise
        unknown[NLL] = f"the server does not score texts ({error})"
    rounds = []
    for number in range(-1, workload.rounds):
        tell(Progress("measuring, round", number + 1, workload.rounds + 1))
        before = Metrics.of(api)
        prompts = workload.prompts(number, per_token)
        found = {MACHINE: machine_ms()}
        found |= speed_of_round(api, model, prompts, scenario.new_tokens, scenario.concurrency)
        after = Metrics.of(api)
        if before is not None and after is not None and (sent := after.sent_per_token(before)):
            found[SENT] = sent
        if number >= 0:
            rounds.append(found)
    by_round = by_figure(rounds)
    if SENT not in by_round:
        silent = Metrics.of(api) is None
        unknown[SENT] = "the server does not tell it at /metrics" if silent else "its ranks sent nothing"
    return Record(
        model=model,
        workload=workload,
        characters_per_token=per_token,
        about=subject.about,
        by_round=by_round,
        by_sequence=by_sequence,
        unknown=unknown,
    )
