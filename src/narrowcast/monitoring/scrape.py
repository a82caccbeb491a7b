"""Figures of a server's /metrics at one moment, and what has changed since an earlier one."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Self

from narrowcast.errors import InvalidInputError, MissingDependencyError

WAIT_S = 5.0  # for an answer
OURS = "narrowcast_"
REMEDY = "Start narrowcast serve, or vLLM with a plan or a codec, and give its address, such as http://127.0.0.1:8000."

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Scrape:
    """Series by name, each with labels and value; `at`: seconds on a clock of its own."""

    series: Mapping[str, list[tuple[Labels, float]]]
    at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, text: str) -> Self:
        """Those of a text in Prometheus's format; ValueError for any other."""
        try:
            from prometheus_client.parser import text_string_to_metric_families
        except ImportError as error:
            raise MissingDependencyError("prometheus-client", "serve") from error
        found: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(found)

    def values(self, name: str, label: str = "") -> dict[str, float]:
        """Values by a label, those that have it alike added up; without a label all under ""."""
        found: dict[str, float] = {}
        for labels, value in self.series.get(name, ()):
            key = labels.get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found

    def largest(self, name: str, label: str = "") -> dict[str, float]:
        """The largest values by a label."""
        found: dict[str, float] = {}
        for labels, value in self.series.get(name, ()):
            key = labels.get(label, "")
            found[key] = max(found.get(key, value), value)
        return found

    def precedes(self, later: "Scrape") -> bool:
        """True unless a counter is lower in `later`: the server has been started again since."""
        for name, series in self.series.items():
            if name.endswith(("_total", "_count")):
                counted = {frozenset(labels.items()): value for labels, value in later.series.get(name, ())}
                if any(counted.get(frozenset(labels.items()), value) < value for labels, value in series):
                    return False
        return True


def address_of(url: str) -> str:
    """The address of /metrics, of that of a server or of its API; InvalidInputError for what is none."""
    given = url if "://" in url else f"http://{url}"
    if not given.startswith(("http://", "https://")):
        raise InvalidInputError(url, expected="an address of http or https", found="another", remedy=REMEDY)
    return given.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"


def scraped(address: str) -> Scrape:
    """All that is there now; InvalidInputError where nobody answers, or a server without figures of narrowcast."""
    try:
        with urllib.request.urlopen(address, timeout=WAIT_S) as answer:
            found = Scrape.of(answer.read().decode("utf8"))
    except urllib.error.HTTPError as error:
        with error:
            status = f"status {error.code} ({error.reason})"
        raise InvalidInputError(address, expected="metrics", found=status, remedy=REMEDY) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or reason
        raise InvalidInputError(address, expected="a server", found=why, remedy=REMEDY) from error
    except ValueError as error:
        raise InvalidInputError(
            address, expected="metrics of Prometheus", found="something else", remedy=REMEDY
        ) from error
    if not any(name.startswith(OURS) for name in found.series):
        raise InvalidInputError(
            address, expected="metrics of narrowcast", found=f"none among {len(found.series)} others", remedy=REMEDY
        )
    return found
