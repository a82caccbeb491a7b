"""The plan: which codec serves which site, with its calibrated tensors, in one safetensors file.

The file's metadata holds a JSON header under "narrowcast" and the SHA-256 of header and tensors under "sha256"
(docs/formats.md). Nothing in it is ever executed.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from narrowcast.codecs import CODECS, CastCodec, Codec
from narrowcast.errors import InvalidInputError, PlanFormatError, PlanMismatchError
from narrowcast.files import write_new
from narrowcast.plan.chains import Chains
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.fingerprint import ModelFingerprint, in_order
from narrowcast.plan.header import check_header
from narrowcast.plan.split import SUMS, Split

T = TypeVar("T")

FORMAT_VERSION = 6
MAX_HEADER_NBYTES = 100 << 20  # of safetensors files


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A named place where a tensor travels. `kind`: one of `split.KINDS`.

    `codecs` by hop: [0] what the ranks put in, [1] a reduced sum where it travels again, [2] sums of nodes.
    `error`: expected relative RMS error by algorithm (of a sum; "once" for what travels once as it is), measured
    on calibration data.
    """

    kind: str
    codecs: tuple[Codec, ...]
    error: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan:
    """The calibrated artifact: for one model, spread as `split` says. Printed, it is a table.

    `groups`: the tensor-parallel ranks of each node, where sums go within nodes first.
    `calibration` says how it was made (JSON values); `sites` maps a layer's name to its codecs. What travels
    elsewhere is not coded. `decisions`: what `tune` measured on the ranks, if it did. `feedback`: which sums leave what
    they lose to the next one.
    """

    split: Split
    groups: tuple[tuple[int, ...], ...] = ()
    model: ModelFingerprint
    calibration: Mapping[str, Any]
    sites: Mapping[str, Site]
    decisions: Decisions = field(default_factory=Decisions)
    feedback: Chains = field(default_factory=Chains)

    def __repr__(self) -> str:
        asked, kinds = self.calibration.get("codec", ""), {site.kind for site in self.sites.values()}
        codec = asked if isinstance(asked, str) else {kind: each for kind, each in asked.items() if kind in kinds}
        return f"Plan({len(self.sites)} sites, {self.split}, {spelling(codec)})"

    def __str__(self) -> str:
        from narrowcast.plan.summary import in_words  # which is of plans

        return in_words(self)

    @property
    def tp_size(self) -> int:
        """Ranks that share a layer."""
        return self.split.tp_size

    @property
    def simulated_only(self) -> str:
        """The reason why no ranks can be split so, and what would do; "" if they can."""
        return str(self.calibration.get("simulated_only", ""))

    def check_real(self) -> None:
        """InvalidInputError for a plan that is simulated only."""
        if self.simulated_only:
            raise InvalidInputError(
                "plan",
                expected="one for ranks that there can be",
                found=f"one that is simulated only ({self.simulated_only})",
                remedy="Calibrate for other ranks, or simulate it.",
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the plan: equal plans, and only those, have equal fingerprints."""
        return _digest(*self._contents())

    def only(self, names: Collection[str]) -> "Plan":
        """This plan with all sites but `names` sent as they are, and nothing tuned: what these alone do."""
        plain = CastCodec(dtype=torch.float32)  # holds what any dtype does
        return replace(
            self,
            sites={
                name: site if name in names else replace(site, codecs=(plain,) * len(site.codecs), error={})
                for name, site in self.sites.items()
            },
            decisions=Decisions(),
        )

    def check(self, model: ModelFingerprint, split: Split) -> None:
        """PlanMismatchError unless the plan is for this model, spread in this way."""
        if difference := self.model.difference(model, whole=split.pp_size == 1):
            expected, found = difference
            raise PlanMismatchError("plan", expected=expected, found=found, remedy="Calibrate this model.")
        if split != self.split:
            raise PlanMismatchError(
                "plan",
                expected=f"{self.split}, for which it was calibrated",
                found=str(split),
                remedy=f"Calibrate with {split}, or run it on the ranks that the plan is for.",
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan whole or not at all. InvalidInputError if `path` exists and `overwrite` is not set."""
        write_new(Path(path), self.to_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan; PlanFormatError if it is none, or truncated, altered, or of another format version."""
        path = Path(path)
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise _unusable(path, expected="a plan file", found=found, remedy="narrowcast calibrate writes them.")
        return cls.from_bytes(path.read_bytes(), path)

    def to_bytes(self) -> bytes:
        """The contents of a plan file."""
        header, tensors = self._contents()
        return safetensors.torch.save(tensors, {"narrowcast": header, "sha256": self.fingerprint})

    @classmethod
    def from_bytes(cls, data: bytes, path: str | os.PathLike[str]) -> "Plan":
        """The plan in `data`, the contents of `path`; raises as `load` does."""
        metadata, tensors = _read(data, path)
        header = _parse(path, metadata["narrowcast"])
        if header.get("format_version") != FORMAT_VERSION:
            raise _unusable(
                path,
                expected=f"format version {FORMAT_VERSION}",
                found=f"version {header.get('format_version')}",
                remedy="Calibrate again, or use the release of narrowcast that wrote it.",
            )
        if metadata.get("sha256") != _digest(metadata["narrowcast"], tensors):
            raise _unusable(path, expected="the contents that were saved", found="altered ones")
        try:
            check_header(header)
            unused = tensors.keys() - {key for name, site in header["sites"].items() for key in _keys(name, site)}
            if unused:
                raise ValueError(f"tensors: expected those of its sites, found {min(unused)!r} too")
            return cls(
                split=Split(**header["split"]),
                groups=tuple(tuple(group) for group in header["groups"]),
                model=ModelFingerprint(**header["model"]),
                calibration=header["calibration"],
                sites={name: _site(name, entry, tensors, header) for name, entry in header["sites"].items()},
                decisions=Decisions.from_json(header["decisions"]),
                feedback=Chains.from_json(header["feedback"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(
                path, expected="the contents of a plan", found=f"{type(error).__name__}: {error}"
            ) from error

    def _contents(self) -> tuple[str, dict[str, Tensor]]:
        sites: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, site in in_order(self.sites):
            hops = []
            for hop, codec in enumerate(site.codecs):
                config, own = codec.state()
                hops.append({"codec": codec.id, "config": config, "tensors": sorted(own)})
                tensors |= {f"{name}/{hop}/{key}": value.cpu().contiguous() for key, value in own.items()}
            sites[name] = {"kind": site.kind, "stages": hops, "error": dict(site.error)}
        header = {
            "format_version": FORMAT_VERSION,
            "split": asdict(self.split),
            "groups": self.groups,
            "model": {"config": dict(self.model.config), "samples": dict(in_order(self.model.samples))},
            "calibration": dict(self.calibration),
            "sites": sites,
            "decisions": self.decisions.to_json(),
            "feedback": self.feedback.to_json(),
        }
        return json.dumps(header), tensors


def _read(data: bytes, path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        found = f"another file, or a part of one ({str(error).removeprefix('Error while deserializing: ')})"
        raise _unusable(path, expected="a plan, which is a whole safetensors file", found=found) from error
    header_nbytes = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + header_nbytes]).get("__metadata__") or {}
    if "narrowcast" not in metadata:
        raise _unusable(path, expected="a narrowcast plan", found="a safetensors file of another kind")
    return metadata, tensors


def _parse(path: str | os.PathLike[str], header: str) -> dict[str, Any]:
    try:
        parsed = json.loads(header)
    except json.JSONDecodeError as error:
        raise _unusable(path, expected="a JSON header", found=str(error)) from error
    if not isinstance(parsed, dict):
        raise _unusable(path, expected="a JSON object as header", found=type(parsed).__name__)
    return parsed


def _site(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Site:
    """The site; ValueError if its codecs are not what was saved, or not of the ranks and features that belong to it."""
    codecs = []
    for index, hop in enumerate(entry["stages"]):
        codec = CODECS[hop["codec"]].from_state(
            hop["config"], {key: tensors[f"{name}/{index}/{key}"] for key in hop["tensors"]}
        )
        config, own = codec.state()
        if json.dumps(config) != json.dumps(hop["config"]) or sorted(own) != hop["tensors"]:
            raise ValueError(f"{name}, hop {index}: expected {config} and {sorted(own)}, found others")
        codecs.append(codec)
    tp_size = header["split"]["tp_size"]
    fitting = ({tp_size}, {1}, {len(header["groups"])}) if entry["kind"] in SUMS else ({1, tp_size},)
    for index, (codec, known) in enumerate(zip(codecs, fitting, strict=False)):
        if codec.num_sources not in {None, *known}:
            raise ValueError(f"{name}, hop {index}: expected a codec of {max(known)} ranks, found {codec.num_sources}")
    if len({codec.calibrated_features for codec in codecs} - {None}) > 1:
        raise ValueError(f"{name}: expected hops of as many features")
    return Site(kind=entry["kind"], codecs=tuple(codecs), error=entry["error"])


def _keys(name: str, entry: Mapping[str, Any]) -> list[str]:
    """The names of a site's tensors."""
    return [f"{name}/{index}/{key}" for index, hop in enumerate(entry["stages"]) for key in hop["tensors"]]


def is_plan(path: Path) -> bool:
    """True for a file that begins as plans do, of whatever format version."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            return "narrowcast" in json.loads(file.read(min(size, MAX_HEADER_NBYTES)))["__metadata__"]
        except (ValueError, KeyError, TypeError):
            return False


def spelling(codec: str | Mapping[str, str]) -> str:
    """The codec of a plan, or those of each kind, as one would ask for them."""
    return codec if isinstance(codec, str) else ", ".join(f"{kind}={each}" for kind, each in codec.items())


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unusable(
    path: str | os.PathLike[str], *, expected: str, found: str, remedy: str = "Calibrate again, or copy it again."
) -> PlanFormatError:
    return PlanFormatError(f"plan {os.fspath(path)}", expected=expected, found=found, remedy=remedy)
