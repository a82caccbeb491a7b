"""Scoring a plan on text, as `evaluate` and `gate` do: what is scored under which conditions, and what was found."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from narrowcast.calibration.text import sequences
from narrowcast.codecs import recipe
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.job import Job, Reference, reference_of, run_on_ranks, run_simulated, tracked
from narrowcast.evaluation.progress import Options, observe_with_bar
from narrowcast.evaluation.sites import SiteError, score_simulated, site_errors
from narrowcast.evaluation.task_run import AnsweredTasks, answers
from narrowcast.evaluation.tasks import TaskSet
from narrowcast.files import read_report
from narrowcast.launch import is_first_rank
from narrowcast.plan import Plan
from narrowcast.runtime.counters import Report
from narrowcast.scores import Score
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport

NUM_SITE_BATCHES = 4
NUM_CURVE_CALIBRATION = 32
CURVE = (
    *("group(bits=3, size=128)", "int4-group128", "group(bits=6, size=128)", "int8-group128"),
    *("int4-feature", "int6-feature", "int8-feature"),
)

FIGURES = {  # of a score: what they are called, and how they are written
    "kl_nats": ("KL from the uncompressed model, nats", "{:.5f}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "top5_agreement": ("top-5 agreement", "{:.2%}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "perplexity_change": ("change of perplexity", "{:+.3%}"),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One codec's price and quality; `kl_nats` with its 95 % confidence interval."""

    name: str
    bits_per_value: float
    kl_nats: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, score: Score, report: Report) -> Self:
        """The point of a plan that sends something."""
        low, high = score.intervals["kl_nats"] or (score.kl_nats, score.kl_nats)
        bits = report.bits_per_value or 0.0
        return cls(name=name, bits_per_value=bits, kl_nats=score.kl_nats, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found: `score` and `report` of the whole plan; if asked for, errors by site, other codecs' points, and
    the answers to zero-shot tasks.
    """

    subject: "Subject"
    score: Score
    report: Report
    sites: Sequence[SiteError] = ()
    curve: Sequence[Point] = ()
    tasks: AnsweredTasks | None = None

    @property
    def point(self) -> Point:
        """This plan's own."""
        return Point.of(self.subject.path.name, self.score, self.report)

    def to_json(self) -> dict[str, Any]:
        """A report's figures, which `gate` takes as a baseline and `--curve-json` as points."""
        return (
            self.subject.conditions
            | {
                "model": self.subject.model,
                "plan": str(self.subject.path),
                "plan_fingerprint": self.subject.plan.fingerprint,
                "real": self.subject.real,
            }
            | self.score.to_json()
            | self.report.to_json()
            | {
                "site_errors": {
                    each.site: {"added_kl_nats": each.added_kl_nats.mean, "interval": each.added_kl_nats.interval()}
                    for each in self.sites
                },
                "point": asdict(self.point),
                "curve": [asdict(point) for point in self.curve],
            }
            | ({} if self.tasks is None else self.tasks.to_json())
        )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A plan to score on `batches` of ids [1, T], simulated or on real ranks."""

    model: str
    path: Path
    plan: Plan
    text: Path
    batches: Sequence[Tensor]
    length: int
    algorithm: str
    real: bool = False
    transport: str = "auto"
    replicate_vocabulary: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    device: str = "cpu"
    tokenizer: Any

    @classmethod
    def load(
        cls, model: str, path: Path, text: Path | None, *, num_sequences: int, length: int, **options: Any
    ) -> "Subject":
        """With the plan of `path`, and `text` (by default MODEL/scoring.txt) in sequences."""
        check_transport(options.get("transport", "auto"))
        plan, tokenizer = Plan.load(path), load_engine().load_tokenizer(model)
        text = text or Path(model) / "scoring.txt"
        batches = sequences(tokenizer, text, length=length, limit=num_sequences)
        return cls(
            model=model, path=path, plan=plan, text=text, batches=batches, length=length, tokenizer=tokenizer, **options
        )

    @property
    def conditions(self) -> dict[str, Any]:
        """In what reports must agree for their figures to be compared: in all but the plan's codecs."""
        digest = hashlib.sha256()
        for ids in self.batches:
            digest.update(f"{list(ids.shape)}".encode() + ids.numpy().tobytes())
        return {
            "model_fingerprint": self.plan.model.digest,
            **asdict(self.plan.split),
            "algorithm": self.algorithm,
            "length": self.length,
            "num_sequences": len(self.batches),
            "text_sha256": digest.hexdigest(),
        }

    def check_comparable(self, report: Mapping[str, Any], path: Path) -> None:
        """InvalidInputError unless the figures of `report`, read from `path`, are of this model, text and split."""
        for name, mine in self.conditions.items():
            if (theirs := report.get(name)) != mine:
                raise InvalidInputError(
                    str(path),
                    expected=f"figures found under the same conditions, {name} {_short(mine)}",
                    found=_short(theirs),
                    remedy="Score the same model, split and text with the same options, or make another report.",
                )

    def points(self, path: Path) -> list[Point]:
        """Of an earlier report found under the same conditions: its plan's own, and those of its curve."""
        report = read_report(path, remedy="Write one with evaluate --json.")
        self.check_comparable(report, path)
        try:
            return [Point(**point) for point in (report["point"], *report["curve"])]
        except (KeyError, TypeError) as error:
            raise InvalidInputError(
                str(path), expected="a report of evaluate", found=str(error), remedy="Write one with evaluate --json."
            ) from error

    def evaluate(
        self, *, sites: bool = False, curve: Path | None = None, tasks: TaskSet | None = None
    ) -> Evaluation | None:
        """Score it; if asked for, each of its sites alone, other codecs calibrated on the text in `curve`, and tasks.

        None on ranks but the first under torchrun.
        """
        whole = load_engine().load(self.model, device=self.device)
        with reference_of(whole, self.batches) as reference:
            job = Job(
                model=self.model,
                plans=[self.path],
                algorithm=self.algorithm,
                transport=self.transport,
                replicate_vocabulary=self.replicate_vocabulary,
                timeout_s=self.timeout_s,
                batches=self.batches,
                reference=reference,
                tasks=tasks,
            )
            uncompressed = answers(self.model, whole, tasks)
            (outcome,) = run_on_ranks(job, self.plan.split) if self.real else run_simulated(job, whole)
            if not is_first_rank():
                return None
            assert outcome.score is not None, "there were batches"
            found = Evaluation(subject=self, score=outcome.score, report=outcome.report)
            if tasks is not None:
                found = replace(found, tasks=AnsweredTasks(tasks, uncompressed, outcome.answers))
            if sites:
                found = replace(found, sites=self._site_errors(whole, reference))
            return replace(found, curve=self._curve(whole, reference, curve)) if curve is not None else found

    def _site_errors(self, whole: nn.Module, reference: Reference) -> list[SiteError]:
        batches = self.batches[:NUM_SITE_BATCHES]
        first = Reference(reference.folder, len(batches))
        found = site_errors(whole, self.plan, first, batches, algorithm=self.algorithm)
        return list(tracked(found, "sites", len(self.plan.sites)))

    def _curve(self, whole: nn.Module, reference: Reference, text: Path) -> list[Point]:
        """Every preset of `CURVE` in place of the plan's codecs."""
        batches = sequences(self.tokenizer, text, length=self.length, limit=NUM_CURVE_CALIBRATION)
        seen = observe_with_bar(whole, batches, self.plan.split, Options(groups=self.plan.groups))
        kinds = {site.kind for site in self.plan.sites.values()}
        points = []
        for preset in tracked(CURVE, "curve"):
            plan = seen.plan(dict.fromkeys(kinds, recipe(preset)))
            found = score_simulated(whole, plan, reference, self.batches, algorithm=self.algorithm)
            points.append(Point.of(preset, *found))
        return points


def _short(value: object) -> str:
    """A condition in a sentence: of a digest, enough to tell it from another."""
    return str(value)[:12] if value is not None else "none"
