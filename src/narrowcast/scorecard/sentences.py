"""Text of any length, the same for the same seed: plain sentences, none of which anyone has written."""

import random
import secrets
from collections.abc import Iterator

_WORDS = """\
captain teacher farmer doctor child neighbour queen sailor painter stranger judge baker soldier widow
carried found painted remembered sold described forgot mended admired followed buried washed bought
letter lantern horse river garden clock song map kettle bridge ring stone basket mirror coat book
old quiet small heavy broken bright strange green long famous empty cheap warm lost narrow honest
"""
SUBJECTS, DEEDS, THINGS, KINDS = (line.split() for line in _WORDS.splitlines())
TIMES = (
    *("before the rain came", "in the summer", "without a word", "near the harbour", "on the way to town"),
    *("when nobody was looking", "for the third time", "as her mother had done", "after the war", "at noon"),
)
_NUM_OPENING = 6  # words: a hundred million openings


def sentences(seed: str) -> Iterator[str]:
    """Sentence after sentence, without end."""
    source = random.Random(seed)
    while True:
        who, deed, thing = (source.choice(words) for words in (SUBJECTS, DEEDS, THINGS))
        kinds = source.choice(KINDS), source.choice(KINDS)
        yield f"The {kinds[0]} {who} {deed} the {kinds[1]} {thing} {source.choice(TIMES)}."


def text(seed: str, num_characters: int) -> str:
    """So many characters of sentences, up to the end of a word, at least one."""
    found = ""
    for sentence in sentences(seed):
        found = f"{found} {sentence}".strip()
        if len(found) > num_characters:
            break
    return found[: num_characters + 1].rpartition(" ")[0] or found.partition(" ")[0]


def opening() -> str:
    """A few words that nobody has sent before: what begins with them is in no cache of equal beginnings."""
    return " ".join(secrets.choice(THINGS + KINDS) for _ in range(_NUM_OPENING))
