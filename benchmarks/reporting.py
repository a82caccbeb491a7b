"""Arguments of the benchmarks beside, and the results that are kept of them.

usage: python benchmarks/reporting.py benchmarks/results/NAME.json REPORT.json ...    (keeps what these reports say)

A result is JSON of a few KB: versions, the date, and for each run its command, its setting, and its tables: names of
columns, then a line for each row.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from narrowcast.files import check_report, versions, write_new

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
DIGITS = 5  # of a figure: more is noise
OF_ALL_RUNS = "narrowcast", "date", "versions"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has: --json FILE."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--json", type=_report, metavar="FILE", help="write the figures here; replaces an earlier report"
    )
    return found


def write(path: Path | None, **setting: Any) -> None:
    """Write one run, whose `setting` holds its tables too, as lists of rows; nothing without a path."""
    if path is not None:
        keep(path, [{"command": shlex.join(["python", *sys.argv]), **setting}])


def keep(path: Path, runs: Iterable[Mapping[str, Any]], made: Mapping[str, Any] | None = None) -> None:
    """Write runs, `made` with these versions and on this date: by default those of now."""
    head = made or {"narrowcast": versions(), "date": f"{date.today()}"}
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in head.items())
    text = f'{{\n{lines},\n"runs": [\n' + ",\n".join(map(_text, runs)) + "\n]}\n"
    write_new(path, text.encode(), overwrite=True)


def read(path: Path) -> list[Row]:
    """The runs of a result, or the one of a report that a command wrote; their tables as lists of rows."""
    report = json.loads(path.read_text(encoding="utf8"))
    runs = report.get("runs") or [{key: value for key, value in report.items() if key not in OF_ALL_RUNS}]
    return [{key: _rows(value) for key, value in run.items()} for run in runs]


def _report(text: str) -> Path:
    path = Path(text)
    check_report(path)
    return path


def _text(run: Mapping[str, Any]) -> str:
    return "{" + ",\n".join(f"{json.dumps(key)}: {_value(_short(value))}" for key, value in run.items()) + "}"


def _value(value: Any) -> str:
    if not _is_table(value):
        return json.dumps(value)
    columns = list(dict.fromkeys(column for row in value for column in row))
    rows = (json.dumps([row.get(column) for column in columns], separators=(",", ":")) for row in value)
    return f'{{"columns": {json.dumps(columns)}, "values": [\n' + ",\n".join(rows) + "\n]}"


def _rows(value: Any) -> Any:
    if not (isinstance(value, dict) and value.keys() == {"columns", "values"}):
        return value
    return [dict(zip(value["columns"], row, strict=True)) for row in value["values"]]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _short(each) for key, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("result", type=Path)
    arguments.add_argument("reports", type=Path, nargs="+")
    asked = arguments.parse_args()
    first = json.loads(asked.reports[0].read_text(encoding="utf8"))
    runs = [run for report in asked.reports for run in read(report)]
    keep(asked.result, runs, {"narrowcast": first["narrowcast"], "date": first["date"]})


if __name__ == "__main__":
    main()
