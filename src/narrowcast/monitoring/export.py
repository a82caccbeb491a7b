"""Writing alerts and the dashboard into a folder."""

import json
from pathlib import Path

from narrowcast.errors import InvalidInputError
from narrowcast.files import check_folder, check_writable, write_new
from narrowcast.monitoring.alerts import ERROR_FACTOR, WRITTEN, alerts, to_yaml
from narrowcast.monitoring.dashboard import dashboard

RULES, DASHBOARD = "narrowcast.rules.yml", "narrowcast.dashboard.json"
RUNBOOK = "docs/monitoring.md"


def export(
    folder: Path,
    *,
    error_factor: float = ERROR_FACTOR,
    ttft_s: float | None = None,
    runbook: str = RUNBOOK,
    overwrite: bool = False,
) -> list[Path]:
    """Write rules for Prometheus and a dashboard for Grafana into `folder`, which is made if need be; their paths.

    `error_factor`, `ttft_s`: see `alerts`. `runbook`: the address at which docs/monitoring.md can be read.
    InvalidInputError, and nothing written, where there is a file that may not be replaced: with `overwrite` an earlier
    export may.
    """
    texts = {
        folder / RULES: to_yaml(alerts(error_factor=error_factor, ttft_s=ttft_s), runbook),
        folder / DASHBOARD: json.dumps(dashboard(runbook, error_factor), indent=2) + "\n",
    }
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(str(folder), expected="a folder", found="a file", remedy="Choose another name.")
    if not folder.exists():
        check_folder(folder, folder.parent)
        folder.mkdir()
    for path in texts:
        _check(path, overwrite=overwrite)
    for path, text in texts.items():
        write_new(path, text.encode(), overwrite=overwrite)
    return list(texts)


def _check(path: Path, *, overwrite: bool) -> None:
    check_writable(path, overwrite=overwrite)
    if path.is_file() and path.stat().st_size and WRITTEN not in path.read_text(encoding="utf8", errors="replace"):
        raise InvalidInputError(
            str(path), expected="a new file or an earlier export", found="another file", remedy="Choose another folder."
        )
