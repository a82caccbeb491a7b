"""Text of tokens as they come: what is settled of it, until the end or a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer shows a part of a character
_CONTEXT = 6  # tokens of the prompt: a tokenizer may leave out the space before the first word


class Text:
    """An answer's text, token by token, up to the first of `stop` strings."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt[-_CONTEXT:])
        # Ids up to `_shown` have been decoded; those from `_since` on are decoded again with the next ones, which may
        # change how the last ones look, but not those before.
        self._since, self._shown = 0, len(self._ids)
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.stopped = False

    def add(self, id: int) -> str:
        """The text that is settled with this token: it may be none, or more than the token's."""
        self._ids.append(id)
        before, after = (self._decode(self._ids[self._since : end]) for end in (self._shown, None))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._since, self._shown = self._shown, len(self._ids)
        self._held += after[len(before) :]
        return self._settled()

    def close(self) -> str:
        """The rest, after the last token."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids[self._since :])[len(self._decode(self._ids[self._since : self._shown])) :]
        self._shown = self._since = len(self._ids)
        self._held += rest
        settled = self._settled()
        return settled if self.stopped else settled + self._held

    def _settled(self) -> str:
        found = [place for each in self._stop if (place := self._held.find(each)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - self._begun()
        settled, self._held = self._held[:end], self._held[end:]
        return settled

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        ends = (self._held[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(each.startswith(end) for each in self._stop)), 0)

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self._tokenizer, ids)


class Spelling:
    """Each token's own text, as it is within a line."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        self._num_before = len(decoded(tokenizer, self._anchor))
        self._known: dict[int, str] = {}

    def of(self, id: int) -> str:
        """The text of a token; special ones are shown by name."""
        if id not in self._known:
            shown = self._tokenizer.decode([*self._anchor, id], clean_up_tokenization_spaces=False)
            self._known[id] = shown[self._num_before :]
        return self._known[id]


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
