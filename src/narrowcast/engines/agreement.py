"""Agreement of ranks on what they are about to do, before any of them does it."""

import json
from collections.abc import Mapping

from narrowcast.errors import NarrowcastError, PlanMismatchError
from narrowcast.transport import Transport


def agreed(transport: Transport, mine: Mapping[str, str], refusal: NarrowcastError | None) -> NarrowcastError | None:
    """The refusal of any rank of the group, this one's first, or of a plan that they do not share."""
    refused = {"refusal": None if refusal is None else str(refusal)}
    texts = transport.share(json.dumps({**mine, **refused}), "comparing plans")
    if refusal is not None:
        return refusal
    for rank, theirs in enumerate(json.loads(text) for text in texts):
        if theirs["refusal"] is not None:
            return PlanMismatchError(
                "plan", expected="one that every rank takes", found=f"rank {rank} refused it", remedy=theirs["refusal"]
            )
        for key, value in mine.items():
            if theirs[key] != value:
                return PlanMismatchError(
                    f"{key} of rank {rank}",
                    expected=f"that of rank {transport.rank}, {_shown(key, value)}",
                    found=_shown(key, theirs[key]),
                    remedy="Give every rank the same plan and options.",
                )
    return None


def _shown(key: str, value: str) -> str:
    """An option as it is, the beginning of a plan's fingerprint."""
    return value[:12] if key == "plan" else value
