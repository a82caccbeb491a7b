"""The page of `evaluate --report`: one file, nothing from elsewhere, figures as in the JSON report."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from commands import refused, run, save_plan
from conftest import MODEL

SHORT = "--num-samples", 3, "--max-seq-len", 32, "--dtype", "float32"


class Page(HTMLParser):
    """What a page has in it: tags, attributes, the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    @property
    def pictures(self) -> dict[str, str]:
        sources = [value for name, value in self.attributes if name == "src"]
        names = [value for name, value in self.attributes if name == "alt"]
        start = "data:image/svg+xml;base64,"
        assert all(source.startswith(start) for source in sources)
        return {
            name: base64.b64decode(source.removeprefix(start)).decode()
            for name, source in zip(names, sources, strict=True)
        }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, str]:
    """Of a plan whose name needs escaping: its path, the JSON report, the page, and what was printed."""
    folder = tmp_path_factory.mktemp("page")
    plan = save_plan(folder / "a<b & c.plan", "int4-feature")
    report, page = folder / "report.json", folder / "page.html"
    shown = run("evaluate", MODEL, "--plan", plan, "--json", report, "--report", page, "--sites", *SHORT)
    return plan, json.loads(report.read_text(encoding="utf8")), page.read_text(encoding="utf8"), shown


def test_the_page_needs_nothing_but_itself(evaluated: tuple[Path, dict[str, Any], str, str]) -> None:
    text = evaluated[2]
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not {"href", "srcset", "onclick", "onload", "style"} & {name for name, _ in page.attributes}
    assert "http" not in text and "url(" not in text and "@import" not in text
    for picture in page.pictures.values():
        ElementTree.fromstring(picture)
        assert not re.search(r'(href|src)="(?!#)', picture)


def test_the_page_says_what_was_scored_and_what_was_found(evaluated: tuple[Path, dict[str, Any], str, str]) -> None:
    plan, report, text, _ = evaluated
    page = Page(text)
    found = {row[0]: row[1:] for row in page.rows if row}
    low, high = report["intervals"]["kl_nats"]
    assert found["KL, nats"] == [f"{report['kl_nats']:.5f}", f"{low:.5f} to {high:.5f}"]
    assert found["top-5 agreement"][0] == f"{report['top5_agreement']:.2%}"
    assert found["perplexity"][0] == f"{report['perplexity']:.4f}"
    assert found["KL, 99.9 % of tokens at most"] == [f"{report['kl_percentiles']['99.9']:.5f}"]
    assert found["plan"] == [str(plan)] and found["fingerprint of the plan"] == [report["plan_fingerprint"][:16]]
    assert found["reference"] == ["the uncompressed model, whole"] and report["reference"] == "whole"
    assert found["split"] == ["tp_size 2"] and "torch" in found["versions"][0] and report["date"] in found["date"]
    site = found["0.mlp.down_proj"]
    assert site[:3] == ["sum", "feature", "4.1875"]
    added = report["site_errors"]["model.layers.0.mlp.down_proj"]["added_kl_nats"]
    assert f"{added:.6f}" in site
    assert page.pictures.keys() == {"KL by percentile of tokens", "figures by site", "ranges of features by site"}


def test_what_was_asked_for_besides_is_printed_and_stored(evaluated: tuple[Path, dict[str, Any], str, str]) -> None:
    _, report, _, shown = evaluated
    assert report["site_errors"].keys() == {name for name, site in report["sites"].items() if site["coded"]}
    assert report["kl_nats"] > 0 and report["bits_per_value"] == (15 * 4.1875 + 8.25) / 16
    assert report["command"].startswith("narrowcast")
    for what in ("95 % interval", "top-5 agreement", "99.9 % of tokens", "each site coded alone"):
        assert what in shown
    assert "…" not in shown


def test_a_page_without_extras_says_how_to_get_them(tmp_path: Path) -> None:
    """Codecs without calibrated ranges have no picture of them."""
    path = tmp_path / "page.html"
    run("evaluate", MODEL, "--plan", save_plan(tmp_path / "plan", "int8-group128"), "--report", path, *SHORT)
    text = path.read_text(encoding="utf8")
    assert "evaluate --sites" in text
    assert Page(text).pictures.keys() == {"KL by percentile of tokens", "figures by site"}
    run("evaluate", MODEL, "--plan", tmp_path / "plan", "--report", path, *SHORT)  # replaces its own


def test_only_an_earlier_page_is_replaced(evaluated: tuple[Path, dict[str, Any], str, str], tmp_path: Path) -> None:
    precious = tmp_path / "page.html"
    for content in ("<!DOCTYPE html><title>mine</title>", '{"narrowcast": {}}'):
        precious.write_text(content)
        command = "evaluate", MODEL, "--plan", evaluated[0], "--report", precious, *SHORT
        assert "found another file" in refused(*command)
        assert precious.read_text() == content
