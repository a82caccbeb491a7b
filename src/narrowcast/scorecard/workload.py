"""The work that a server is measured by: rounds of requests, and texts to score."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from narrowcast.calibration.text import documents
from narrowcast.errors import InvalidInputError
from narrowcast.scorecard.scenario import Scenario
from narrowcast.scorecard.sentences import opening, text

TEXT_CHARACTERS = 1000  # of a text to score: about 250 tokens of English


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`rounds` of a scenario's requests, the same ones every time but for their first words; `texts` to score."""

    scenario: Scenario
    rounds: int
    texts: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The workload of which `to_json` gave that; KeyError, TypeError or ValueError for anything else."""
        fields = dict(values["scenario"])
        texts = tuple(values["texts"])
        if not all(isinstance(each, str) for each in texts):
            raise TypeError("texts that are none")
        return cls(scenario=Scenario.of(fields.pop("name"), fields), rounds=int(values["rounds"]), texts=texts)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"scenario": self.scenario.to_json(), "rounds": self.rounds, "texts": list(self.texts)}

    def prompts(self, round: int, characters_per_token: float) -> list[str]:
        """The prompts of one round, by its number."""
        scenario, found = self.scenario, []
        for index in range(scenario.requests):
            length = scenario.prompt_tokens[index % len(scenario.prompt_tokens)]
            begun = f"{opening()}. "
            num_characters = int(length * characters_per_token) - len(begun)
            found.append(begun + text(f"{round}.{index}", max(1, num_characters)))
        return found


def texts_of(path: Path, limit: int) -> tuple[str, ...]:
    """Texts to score: pieces of a text file, `limit` at most; InvalidInputError for less than two."""
    found = [piece for document in documents(path) for piece in _pieces(document)][:limit]
    if len(found) < 2:
        raise InvalidInputError(
            str(path),
            expected=f"two pieces of {TEXT_CHARACTERS} characters, or more",
            found=len(found),
            remedy="Pass more text.",
        )
    return tuple(found)


def _pieces(document: str) -> Iterator[str]:
    """Pieces that end with a word; a scrap at the end, less than half of one, is left out."""
    while len(document) > TEXT_CHARACTERS / 2:
        end = len(document) if len(document) <= TEXT_CHARACTERS else _end_of_word(document)
        yield document[:end]
        document = document[end:].lstrip()


def _end_of_word(document: str) -> int:
    ends = [place for place in range(TEXT_CHARACTERS // 2, TEXT_CHARACTERS) if document[place].isspace()]
    return ends[-1] if ends else TEXT_CHARACTERS
