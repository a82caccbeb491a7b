"""A dashboard for Grafana: rows of panels, of which each asks Prometheus a few questions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from narrowcast.monitoring.alerts import ERROR_FACTOR, MOST_CLIPPED, MOST_GUARDED, WRITTEN, drift_factor
from narrowcast.monitoring.queries import Queries

Json = dict[str, Any]

GRID = 24  # columns of a page
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'instance=~"$instance"'
NOW, SAMPLED, SHOWN = (Queries(window, CHOSEN) for window in ("$__rate_interval", "30m", "$__range"))
GREEN, YELLOW, RED = "green", "yellow", "red"
TTFT, GAP = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A picture of `queries`, by legend. `kind`: a plug-in of Grafana; `unit`: one of its units.

    `limits`: values from which on it is yellow, and red. `options` are those of the plug-in, `custom` of its fields.
    """

    title: str
    about: str
    queries: Mapping[str, str]
    kind: str = "timeseries"
    unit: str = "short"
    limits: Sequence[float] = ()
    options: Json = field(default_factory=dict)
    custom: Json = field(default_factory=dict)
    max_points: int | None = None

    def to_json(self, number: int, place: Mapping[str, int]) -> Json:
        """The panel of this number, at `place` of the grid."""
        steps: list[Json] = [{"color": GREEN, "value": None}]
        steps += [{"color": color, "value": value} for color, value in zip((YELLOW, RED), self.limits, strict=False)]
        defaults = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}, "custom": self.custom}
        if self.kind in ("stat", "status-history"):
            defaults["color"] = {"mode": "thresholds"}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": SOURCE,
            "gridPos": dict(place),
            "targets": list(self._targets()),
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": self.options,
        } | ({} if self.max_points is None else {"maxDataPoints": self.max_points})

    def _targets(self) -> Iterator[Json]:
        for ref, (legend, query) in zip("ABCDEFGH", self.queries.items(), strict=False):
            form = {"heatmap": "heatmap", "table": "table"}.get(self.kind, "time_series")
            often = {"instant": True, "range": False} if self.kind in ("stat", "table") else {"range": True}
            yield {"refId": ref, "datasource": SOURCE, "expr": query, "legendFormat": legend, "format": form, **often}


def dashboard(runbook: str, error_factor: float = ERROR_FACTOR) -> Json:
    """The dashboard as Grafana imports it; `runbook`: the page that alerts link to; `error_factor`: theirs."""
    limits = drift_factor(error_factor), error_factor
    return {
        "uid": "narrowcast",
        "title": "narrowcast",
        "description": f"{WRITTEN}. What the panels mean: {runbook}",
        "tags": ["narrowcast"],
        "schemaVersion": 38,
        "editable": True,
        "graphTooltip": 1,  # a line at the same time in all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [*_variables()]},
        "panels": [*_laid_out(_rows(limits))],
    }


def _variables() -> Iterator[Json]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    yield {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(narrowcast_info, instance)", "refId": "instances"},
        "refresh": 2,  # whenever the time changes
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _laid_out(rows: Mapping[str, Sequence[Panel]]) -> Iterator[Json]:
    """Rows one below the other, of which the panels share the width."""
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "gridPos": {"h": 1, "w": GRID, "x": 0, "y": y}}
        y += 1
        height, width = 4 if panels[0].kind == "stat" else 8, GRID // len(panels)
        for column, panel in enumerate(panels):
            number += 1
            yield panel.to_json(number, {"h": height, "w": width, "x": column * width, "y": y})
        y += height


def _rows(limits: Sequence[float]) -> dict[str, Sequence[Panel]]:
    return {
        "Now": _now(limits),
        "Traffic": _traffic(),
        "Error by site": [_heat(limits)],
        "Errors": _errors(),
        "Ranges": _ranges(),
        "Requests": _requests(),
        "Latency": _latency(),
        "Ranks": _ranks(),
    }


def _now(errors: Sequence[float]) -> list[Panel]:
    saved = " - ".join(f"sum({NOW.series(f'narrowcast_{each}_bytes_total')})" for each in ("uncompressed", "sent"))
    lost = SHOWN.total("narrowcast_site_non_finite_values_total", function="increase")
    ours = NOW.series("ALERTS", 'alertname=~"Narrowcast.+",alertstate="firing"')
    figures: list[tuple[str, str, str, str, Sequence[float]]] = [
        ("Alerts", "Those of narrowcast that fire.", f"count({ours}) or vector(0)", "short", (1, 1)),
        ("Ranks", "Ranks that are heard of.", f"count({NOW.series('narrowcast_info')})", "short", ()),
        ("Bits a value", "Of coded values, now.", f"max({NOW.bits()})", "short", ()),
        ("Saved", "Bytes that were not sent, since the servers were started.", saved, "bytes", ()),
        (
            "Largest error",
            "Of any site, over the plan's, in 30 minutes.",
            f"max({SAMPLED.error_ratio()})",
            "short",
            errors,
        ),
        ("Not finite", "Values that were NaN or infinite, in the time shown.", f"sum({lost})", "short", (1, 1)),
    ]
    return [
        Panel(title=title, about=about, queries={"": query}, kind="stat", unit=unit, limits=limits)
        for title, about, query, unit, limits in figures
    ]


def _traffic() -> list[Panel]:
    planned = NOW.planned_bits()
    sent, plain = (
        NOW.total(f"narrowcast_{each}_bytes_total", "kind", "codec", "hop") for each in ("sent", "uncompressed")
    )
    calls = NOW.total("narrowcast_calls_total", "kind")
    return [
        Panel(
            title="Bits a value",
            about="What a coded value takes, and what the plan says.",
            queries={"{{instance}} now": NOW.bits(), "{{instance}} planned": planned},
        ),
        Panel(
            title="Bytes sent and saved",
            about="By all ranks. Saved: what the same values take in the model's own dtype, less what was sent.",
            queries={"{{instance}} sent": sent, "{{instance}} saved": f"{plain}\n  - {sent}"},
            unit="Bps",
        ),
        Panel(
            title="Sums and other transfers",
            about="By codec (none: not coded), algorithm, and path; all ranks.",
            queries={"{{codec}} {{algorithm}} {{path}}": f"sum by (codec, algorithm, path) ({calls})"},
            unit="ops",
        ),
    ]


def _heat(limits: Sequence[float]) -> Panel:
    return Panel(
        title="Relative error of sampled sums, over the plan's",
        about="Of the last 30 minutes. 1: as calibrated. Yellow sites have drifted, red ones raise an alert.",
        queries={"{{site}}": f"max by (site) ({SAMPLED.error_ratio()})"},
        kind="status-history",
        limits=limits,
        options={"showValue": "never", "rowHeight": 0.9},
        max_points=60,
    )


def _errors() -> list[Panel]:
    ratios = NOW.over("rate", "narrowcast_relative_error_ratio_bucket")
    parts = SAMPLED.mean("narrowcast_sum_part_seconds")
    return [
        Panel(
            title="Errors over the plan's",
            about="How many sampled sums had such an error, by all ranks and sites.",
            queries={"{{le}}": f"sum by (le) ({ratios})"},
            kind="heatmap",
            options={"calculate": False},
        ),
        Panel(
            title="Fed back",
            about="What the next sum makes good, beside the stream that it goes into. Mean of 30 minutes.",
            queries={"{{kind}} rank {{rank}}": SAMPLED.mean("narrowcast_residue_ratio")},
            unit="percentunit",
        ),
        Panel(
            title="Parts of a sum",
            about="Seconds of sampled sums, which are made by steps. Mean of 30 minutes and all ranks.",
            queries={"{{kind}} {{part}}": f"avg by (kind, part) ({parts})"},
            unit="s",
            custom={"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40},
        ),
    ]


def _ranges() -> list[Panel]:
    lost = NOW.total("narrowcast_site_non_finite_values_total", function="increase")
    fallbacks = NOW.total("narrowcast_fallbacks_total")
    return [
        Panel(
            title="Clipped",
            about="Coded values beyond the calibrated range, over values sent: the ten sites with most.",
            queries={"{{site}}": f"topk(10, {NOW.clipped()})"},
            unit="percentunit",
            limits=(MOST_CLIPPED / 2, MOST_CLIPPED),
        ),
        Panel(
            title="Guarded",
            about="Tokens so far out of range that they were coded in a safe form, over all: the ten sites with most.",
            queries={"{{site}}": f"topk(10, {NOW.guarded()})"},
            unit="percentunit",
            limits=(MOST_GUARDED / 2, MOST_GUARDED),
        ),
        Panel(
            title="Fallbacks",
            about="uncoded: sums in the model's own dtype, as the plan's decisions have it. guarded: as beside.",
            queries={"{{instance}} {{reason}}": fallbacks},
            unit="ops",
        ),
        Panel(
            title="Not finite",
            about="Coded values that were NaN or infinite.",
            queries={"{{site}}": f"{lost} > 0"},
        ),
    ]


def _requests() -> list[Panel]:
    tokens = {each: NOW.over("rate", f"vllm:{each}_tokens_total") for each in ("generation", "prompt")}
    waiting = {each: NOW.series(f"vllm:num_requests_{each}") for each in ("running", "waiting")}
    ended = NOW.over("rate", "vllm:request_success_total")
    return [
        Panel(
            title="Tokens",
            about="Generated, and read in prompts.",
            queries={f"{{{{instance}}}} {each}": query for each, query in tokens.items()},
            unit="ops",
        ),
        Panel(
            title="Requests at once",
            about="With the model, and before it.",
            queries={f"{{{{instance}}}} {each}": query for each, query in waiting.items()},
        ),
        Panel(
            title="Requests ended",
            about="By reason.",
            queries={"{{instance}} {{finished_reason}}": ended},
            unit="reqps",
        ),
        Panel(
            title="Room for keys and values",
            about="The share that is used.",
            queries={"{{instance}}": NOW.series("vllm:kv_cache_usage_perc")},
            unit="percentunit",
        ),
    ]


def _latency() -> list[Panel]:
    figures = {
        "First token": ("Seconds until a request's first token.", TTFT),
        "Between tokens": ("Seconds from one token of a request to the next.", GAP),
        "Whole requests": ("Seconds from a request to its last token.", "vllm:e2e_request_latency_seconds"),
        "Waiting": ("Seconds that requests wait for a place.", "vllm:request_queue_time_seconds"),
    }
    return [
        Panel(
            title=title,
            about=f"{about} Quantiles are as exact as the bounds of the histogram.",
            queries={
                "{{instance}} mean": NOW.mean(name),
                "{{instance}} p50": NOW.quantile(0.5, name),
                "{{instance}} p95": NOW.quantile(0.95, name),
            },
            unit="s",
        )
        for title, (about, name) in figures.items()
    ]


def _ranks() -> list[Panel]:
    return [
        Panel(
            title="Ranks",
            about="Versions, plans, transports and kernels: all ranks of a server should have the same.",
            queries={"": NOW.series("narrowcast_info")},
            kind="table",
        ),
        Panel(
            title="Age of figures",
            about="Under load: how long ranks have been at one step. In vLLM, since a rank's figures changed last.",
            queries={"{{instance}} rank {{rank}}": f"time() - {NOW.series('narrowcast_snapshot_timestamp_seconds')}"},
            unit="s",
        ),
    ]
