from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from invdyn.doctor.examine import diagnose
from invdyn.doctor.findings import ERROR, INFO, WARNING, Finding, by_severity, count_severities, summarize
from invdyn.doctor.report import render_console, write_reports
from invdyn.errors import DataError
from invdyn.transitions.dataset_config import DatasetConfig
from tests.doctor.recordings import record, write_shards


class Links(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.found += [str(values[name]) for name in ("src", "href", "data") if name in values]
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory):
    states, actions = record(30)
    states[4][9] = states[4][8]
    others, acted = record(1, 30, seed=5, spread=20.0)
    states[20][30:], actions[20][30:] = others[0], acted[0]
    folder = write_shards(tmp_path_factory.mktemp("masses"), states, actions)
    return diagnose(DatasetConfig(name="masses", buffer_path=str(folder)))


def test_console_says_what_where_and_what_to_set(diagnosis):
    text = render_console(diagnosis)
    assert text.startswith("doctor: masses: 1 error, ")
    assert "error    1 step jumps like a reset that the file does not mark" in text
    assert "shard-00001.hdf5: episode 5, step 29" in " ".join(text.split())
    assert "set: filters: {drop_stale: true}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_path_that_is_no_text(diagnosis, tmp_path):
    page = write_reports(replace(diagnosis, path="/recordings/m\udce4rz"), tmp_path)
    assert r"/recordings/m\udce4rz" in page.read_text()
    assert json.loads((tmp_path / "doctor.json").read_text())["path"] == "/recordings/m\udce4rz"


def test_json_holds_every_finding_and_measurement(diagnosis, tmp_path):
    write_reports(diagnosis, tmp_path / "report")
    values = json.loads((tmp_path / "report/doctor.json").read_text())
    assert [f["check"] for f in values["findings"]] == [f.check for f in diagnosis.findings]
    stale = next(f for f in values["findings"] if f["check"] == "stale")
    assert stale["places"] == [{"file": "shard-00000.hdf5", "episode": 4, "step": 8, "row": None}]
    assert values["states"] == {"total": 1830, "looked_at": 1830}
    assert len(values["lag"]["unexplained"]) == len(values["lag"]["shifts"])
    first = values["identifiability"]["grid"][0]
    assert (first["gap"], first["history"]) == (1, 0)
    assert [s["split"] for s in values["splits"]] == ["val", "test"]


def test_page_needs_nothing_else_and_has_every_finding(diagnosis, tmp_path):
    page = write_reports(diagnosis, tmp_path / "report")
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert len(links.found) == 6
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    for finding in diagnosis.findings:
        assert escape(finding.title) in text
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["doctor.html", "doctor.json"]


def test_page_escapes_what_files_are_called(tmp_path):
    folder = write_shards(tmp_path / "sequence", *record(12))
    for shard in folder.iterdir():
        shard.rename(shard.with_name(f"<script>alert(1)<{shard.name}"))
    config = DatasetConfig(name="x", buffer_path=str(folder))
    diagnosis = diagnose(config)
    hostile = Finding("stale", WARNING, "<script>alert(2)</script>", "<b>", "<i>")
    object.__setattr__(diagnosis, "findings", (*diagnosis.findings, hostile))
    text = write_reports(diagnosis, tmp_path / "report").read_text()
    assert "<script" not in text
    assert "<i>" not in text


def test_reports_replace_earlier_ones_and_say_when_they_cannot(diagnosis, tmp_path):
    write_reports(diagnosis, tmp_path)
    write_reports(diagnosis, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot write the report"):
        write_reports(diagnosis, tmp_path / "file")


def test_a_diagnosis_without_measurements_is_written_too(tmp_path):
    states, actions = record(12)
    folder = write_shards(tmp_path / "s", [s * np.nan for s in states], actions)
    diagnosis = diagnose(DatasetConfig(name="bad", buffer_path=str(folder)))
    text = write_reports(diagnosis, tmp_path / "report").read_text()
    assert "NaN or infinity in state" in text
    assert "1 error" in render_console(diagnosis)


def test_summary_leaves_notes_out_and_orders_by_severity():
    findings = [
        Finding("a", INFO, "a note", ""),
        Finding("b", WARNING, "a warning", "", "gap: 2"),
        Finding("c", ERROR, "an error", ""),
    ]
    assert [f.check for f in by_severity(findings)] == ["c", "b", "a"]
    assert count_severities(findings) == "1 error, 1 warning"
    assert summarize(findings).splitlines() == [
        "doctor: 1 error, 1 warning",
        "  error: an error",
        "  warning: a warning; gap: 2",
    ]
