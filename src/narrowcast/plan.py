"""The plan: which codec serves which site, with its calibrated tensors, in one safetensors file.

The file's metadata holds a JSON header under "narrowcast" and the SHA-256 of header and tensors under "sha256"
(docs/formats.md). Nothing in it is ever executed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrowcast.codecs import CODECS, Codec
from narrowcast.errors import InvalidInputError, PlanFormatError, PlanMismatchError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """What tells one model from another: config fields, and digests of samples of its weights by name.

    A rank of a split model holds only some of the samples: the others are None.
    """

    config: Mapping[str, Any]
    samples: Mapping[str, Sequence[str | None]]

    def difference(self, found: "ModelFingerprint") -> tuple[str, str] | None:
        """(expected, found) of the first thing in which `found` differs from this one; None if it agrees."""
        for key, value in self.config.items():
            if found.config.get(key) != value:
                return f"a model with {key} = {value!r}", repr(found.config.get(key))
        for name, digests in self.samples.items():
            other = found.samples.get(name, ())
            if len(digests) != len(other):
                return f"a model with {name}", "one without it"
            if any(mine != theirs for mine, theirs in zip(digests, other, strict=True) if None not in (mine, theirs)):
                return f"the weights that the plan was calibrated on in {name}", "others"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A named place where a tensor travels. `codecs` by stage: [0] partial sums, [1] the reduced sum.

    `error`: expected relative RMS error of the coded sum by algorithm, measured on calibration data.
    """

    kind: str
    codecs: tuple[Codec, ...]
    error: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The calibrated artifact: for one model, split over `tp_size` ranks.

    `calibration` says how it was made (JSON values); `sites` maps a layer's name to its codecs.
    """

    tp_size: int
    model: ModelFingerprint
    calibration: Mapping[str, Any]
    sites: Mapping[str, Site]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the plan: equal plans, and only those, have equal fingerprints."""
        return _digest(*self._contents())

    def check(self, model: ModelFingerprint, *, tp_size: int) -> None:
        """PlanMismatchError unless the plan is for this model, split over `tp_size` ranks."""
        if tp_size != self.tp_size:
            raise PlanMismatchError(
                "plan",
                expected=f"tp_size {self.tp_size}, for which it was calibrated",
                found=f"tp_size {tp_size}",
                remedy=f"Calibrate with tp_size={tp_size}.",
            )
        if difference := self.model.difference(model):
            expected, found = difference
            raise PlanMismatchError("plan", expected=expected, found=found, remedy="Calibrate this model.")

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan whole or not at all. InvalidInputError if `path` exists and `overwrite` is not set."""
        path = Path(path)
        check_writable(path, overwrite=overwrite)
        header, tensors = self._contents()
        metadata = {"narrowcast": header, "sha256": self.fingerprint}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(safetensors.torch.save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            if overwrite or not _link(temporary, path):
                temporary.replace(path)
        except FileExistsError:
            check_writable(path, overwrite=overwrite)
            raise
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan; PlanFormatError if it is none, or truncated, altered, or of another format version."""
        metadata, tensors = _read(Path(path))
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
            return cls(
                tp_size=header["tp_size"],
                model=ModelFingerprint(**header["model"]),
                calibration=header["calibration"],
                sites={name: _site(name, entry, tensors) for name, entry in header["sites"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _unusable(path, expected="the header of a plan", found=f"{type(error).__name__}: {error}") from error

    def _contents(self) -> tuple[str, dict[str, Tensor]]:
        sites: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            stages = []
            for stage, codec in enumerate(site.codecs):
                config, own = codec.state()
                stages.append({"codec": codec.id, "config": config, "tensors": sorted(own)})
                tensors |= {f"{name}/{stage}/{key}": value.cpu().contiguous() for key, value in own.items()}
            sites[name] = {"kind": site.kind, "stages": stages, "error": dict(site.error)}
        header = {
            "format_version": FORMAT_VERSION,
            "tp_size": self.tp_size,
            "model": {"config": dict(self.model.config), "samples": dict(self.model.samples)},
            "calibration": dict(self.calibration),
            "sites": sites,
        }
        return json.dumps(header), tensors


def check_writable(path: Path, *, overwrite: bool) -> None:
    """InvalidInputError if `path` exists and may not be replaced, or has no folder: before the work, not after."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise InvalidInputError(
            str(path),
            expected="a new file",
            found="a folder" if path.is_dir() else "a file that exists",
            remedy="Choose another name" + ("." if path.is_dir() else ", or pass overwrite=True (--overwrite)."),
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            str(path), expected="a folder that exists", found=f"no {path.parent}", remedy="Create it first."
        )


def _link(source: Path, path: Path) -> bool:
    """Make `path`, unless the file system has no links. Unlike a rename, a link never replaces another's file."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise _unusable(path, expected="a plan file", found="a folder" if path.is_dir() else "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _unusable(path, expected="a whole safetensors file", found=str(error)) from error
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


def _site(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Site:
    codecs = tuple(
        CODECS[stage["codec"]].from_state(
            stage["config"], {key: tensors[f"{name}/{index}/{key}"] for key in stage["tensors"]}
        )
        for index, stage in enumerate(entry["stages"])
    )
    return Site(kind=entry["kind"], codecs=codecs, error=entry["error"])


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
