"""Scenarios: the requests of a round, as a file has them."""

import tomllib
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from narrowcast.errors import InvalidInputError
from narrowcast.launch import Link

_SHIPPED = files("narrowcast.scorecard") / "scenarios"
SCENARIOS = tuple(sorted(each.name.removesuffix(".toml") for each in _SHIPPED.iterdir()))
FIELDS = "prompt_tokens, new_tokens, requests and concurrency, and link if you like"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The requests of a round: `requests` of them, `concurrency` at once.

    `prompt_tokens`: lengths of their prompts, in turn, as nearly as the text allows. Each is answered by `new_tokens`.
    `link`: between the ranks, as `Link.parse` has it, where these are started for it.
    """

    name: str
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    requests: int
    concurrency: int
    link: str | None = None

    def __post_init__(self) -> None:
        numbers = [
            *(("prompt_tokens", each) for each in self.prompt_tokens or (0,)),
            *((name, getattr(self, name)) for name in ("new_tokens", "requests", "concurrency")),
        ]
        for name, number in numbers:
            if type(number) is not int or number < 1:
                raise self._refused(f"{name} of 1 or more", number)
        if self.new_tokens < 2:
            raise self._refused("new_tokens of 2 or more, between which there is time", self.new_tokens)
        if self.requests < self.concurrency:
            raise self._refused(f"{self.concurrency} requests or more, as so many run at once", self.requests)
        if self.link is not None:
            Link.parse(self.link)

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.prompt_tokens))
        on = f", on {self.link}" if self.link else ""
        return (
            f"{self.name}: {self.requests} requests, {self.concurrency} at once, prompts of {lengths} tokens, answers "
            f"of {self.new_tokens}{on}"
        )

    @classmethod
    def load(cls, name: str) -> Self:
        """The scenario of that name among `SCENARIOS`, or of a TOML file; InvalidInputError for anything else."""
        shipped, path = name in SCENARIOS, Path(name)
        if not shipped and not path.is_file():
            known = ", ".join(SCENARIOS)
            raise InvalidInputError(
                "--scenario", expected=f"{known} or a file", found=name, remedy="Write one, or choose one of these."
            )
        try:
            text = (_SHIPPED / f"{name}.toml" if shipped else path).read_text(encoding="utf8")
            return cls.of(path.stem, tomllib.loads(text))
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(name, expected=f"TOML with {FIELDS}", found=error, remedy="Correct it.") from error

    @classmethod
    def of(cls, name: str, fields: dict[str, Any]) -> Self:
        """The scenario of such fields; InvalidInputError for others."""
        lengths = fields.get("prompt_tokens")
        try:
            return cls(name=name, **{**fields, "prompt_tokens": tuple(lengths if isinstance(lengths, list) else ())})
        except TypeError as error:
            found = ", ".join(fields) or "nothing"
            raise InvalidInputError(f"scenario {name}", expected=FIELDS, found=found, remedy="Correct it.") from error

    def to_json(self) -> dict[str, Any]:
        """JSON values, of which `of` makes it again."""
        return {**asdict(self), "prompt_tokens": list(self.prompt_tokens)}

    def _refused(self, expected: str, found: object) -> InvalidInputError:
        return InvalidInputError(f"scenario {self.name}", expected=expected, found=found, remedy="Correct it.")
