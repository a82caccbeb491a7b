"""The fingerprint of a model: what tells one model from another, whole or split."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """A model's identity: config fields, and digests of samples of its weights by name.

    A rank of a split model holds only some of the samples: the others are None.
    """

    config: Mapping[str, Any]
    samples: Mapping[str, Sequence[str | None]]

    def difference(self, found: "ModelFingerprint", *, whole: bool = True) -> tuple[str, str] | None:
        """(expected, found) of the first thing in which `found` differs from this one; None if it agrees.

        Where `found` is not of the `whole` depth of the model, weights may be missing in it.
        """
        for key, value in self.config.items():
            if found.config.get(key) != value:
                return f"a model with {key} = {value!r}", repr(found.config.get(key))
        for name, digests in self.samples.items():
            if name not in found.samples and not whole:
                continue
            other = found.samples.get(name, ())
            if len(digests) != len(other):
                return f"a model with {name}", "one without it"
            if any(mine != theirs for mine, theirs in zip(digests, other, strict=True) if None not in (mine, theirs)):
                return f"the weights that the plan was calibrated on in {name}", "others"
        return None

    def merged(self, other: "ModelFingerprint") -> "ModelFingerprint":
        """The fingerprint that this one and `other`, of another rank of the same split model, make up together."""
        samples = {name: list(digests) for name, digests in self.samples.items()}
        for name, digests in other.samples.items():
            known = samples.get(name, [None] * len(digests))
            samples[name] = [mine or theirs for mine, theirs in zip(known, digests, strict=True)]
        return ModelFingerprint(config=self.config, samples=samples)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole fingerprint."""
        values = {"config": dict(self.config), "samples": dict(in_order(self.samples))}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def in_order(by_name: Mapping[str, T]) -> list[tuple[str, T]]:
    """By name, layer 10 after layer 9: whoever made a plan, and in whatever order, its contents stand alike."""
    return sorted(by_name.items(), key=lambda item: [(part.isdigit(), part.zfill(9)) for part in item[0].split(".")])
