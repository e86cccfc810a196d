from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from invdyn.errors import DataError
from invdyn.evaluation.evaluate import evaluate, linear_baseline
from invdyn.evaluation.plots import plot_distributions, plot_training_curve
from invdyn.evaluation.report import dataset_facts, write_report
from invdyn.evaluation.results import Evaluation
from invdyn.evaluation.summary import dimension_table, distribution_table, explanations, number, summary_table
from invdyn.models.flow import FlowInverseDynamics
from invdyn.transitions.store import TransitionStore
from tests.evaluation.pendulum import extract

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '<script>alert("1")</script>&'


class Links(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [str(values[name]) for name in ("src", "href", "action", "data") if name in values]
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)


@pytest.fixture(scope="module")
def evaluation(store: TransitionStore) -> Evaluation:
    torch.manual_seed(0)
    flow = FlowInverseDynamics(4, 1, 8, (16,), network="mlp", num_inference_steps=2)
    flow.fit_normalization(store.moments)
    return evaluate({HOSTILE: flow, "linear": linear_baseline(store)}, store, step_counts=(1, 2))


@pytest.fixture
def report(evaluation: Evaluation, store: TransitionStore, tmp_path: Path) -> Path:
    metrics_csv = tmp_path / "metrics.csv"
    metrics_csv.write_text("step,train_loss,val_loss\n10,1.0,\n20,0.5,0.6\n")
    sections = {"Dataset": dataset_facts(store, "test"), HOSTILE: {HOSTILE: HOSTILE, "loss": float("nan")}}
    return write_report(
        evaluation,
        tmp_path / "evaluation",
        title=HOSTILE,
        sections=sections,
        extra_warnings=[HOSTILE],
        metrics_csv=metrics_csv,
    )


def test_the_report_needs_no_other_file_and_runs_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert len(links.found) == 5
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_report_escapes_every_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;") >= 7


def test_the_report_names_the_dataset(report: Path, store: TransitionStore) -> None:
    text = report.read_text(encoding="utf-8")
    assert store.content_hash in text
    assert "InvertedPendulumIntegrableDynamicsShift-v5" in text


def test_metrics_json_is_strict_json_with_all_results(report: Path, evaluation: Evaluation) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = json.loads(report.with_name("metrics.json").read_text(), parse_constant=refuse)
    assert [r["model"] for r in values["results"]] == [HOSTILE, HOSTILE, "linear"]
    assert values["results"][0]["one_sample"]["nrmse"] == evaluation.results[0].one_sample.nrmse
    assert values["recorded"]["round_trip"]["nrmse"] < 2e-6
    assert values["sections"][HOSTILE]["loss"] is None
    assert "examples" not in values["results"][0]


def test_only_the_report_and_its_pictures_are_left(report: Path) -> None:
    names = {path.name for path in report.parent.iterdir()}
    pictures = {"calibration", "quality_against_steps", "error_per_dim", "predicted_against_true", "training_curve"}
    assert names == {"report.html", "metrics.json", *(f"{name}.png" for name in pictures)}
    assert all(path.read_bytes().startswith(PNG) for path in report.parent.glob("*.png"))


def test_a_folder_that_cannot_be_written_is_one_clear_error(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the report to"):
        write_report(evaluation, tmp_path / "file" / "evaluation", title="t", sections={})


def test_the_table_marks_the_best_and_the_default(evaluation: Evaluation) -> None:
    table = summary_table(evaluation)
    column = list(table.header).index("RMSE / std, one sample")
    errors = [result.one_sample.nrmse for result in evaluation.results]
    assert {row for row, where in table.best if where == column} == {errors.index(min(errors))}
    assert table.chosen == 1
    assert [row[0] for row in table.rows[-2:]] == ["recorded actions (floor)", "neighbours (floor, at most)"]
    assert {len(row) for row in table.rows} == {len(table.header)}
    explained = dict(explanations(evaluation))
    assert "or less" in explained["neighbours"]
    assert "Not available for linear: log_prob needs a model with a density" in explained["NLL"]
    assert f"Not available for {HOSTILE}" not in explained["NLL"]


def test_the_table_of_distributions_has_every_model_at_its_own_steps(evaluation: Evaluation) -> None:
    table = distribution_table(evaluation)
    assert [row[0] for row in table.rows] == [f"{HOSTILE}, 2 steps", "linear"]
    assert {len(row) for row in table.rows} == {len(table.header)}
    own = evaluation.default_of(HOSTILE)
    interval = own.calibration.coverage_90_interval
    assert interval is not None
    cell = table.rows[0][list(table.header).index("in 90% region")]
    assert cell == f"{own.calibration.coverage_90:.1%}\n[{interval.low:.1%}, {interval.high:.1%}]"


def test_the_table_of_dimensions_is_in_the_units_of_the_action(evaluation: Evaluation, store: TransitionStore) -> None:
    table, own = dimension_table(evaluation), evaluation.default_of(HOSTILE).one_sample
    assert len(table.rows) == store.action_dim
    assert table.rows[0][1] == number(own.nrmse_per_dim[0] * store.moments.std[-1])


def test_a_training_curve_needs_rows(tmp_path: Path) -> None:
    assert not plot_training_curve(tmp_path / "none.csv", tmp_path / "curve.png")
    (tmp_path / "empty.csv").write_text("step,train_loss\n")
    assert not plot_training_curve(tmp_path / "empty.csv", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("options", [{}, {"history": 2, "horizon": 3}, {"test_ratio": 0}])
def test_distributions_are_drawn_for_every_kind_of_row(
    recording: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    plot_distributions(extract(recording, **options), tmp_path / "made" / "distributions.png")
    assert (tmp_path / "made" / "distributions.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "0.0123"), (99.99, "100"), (123456.0, "123,000"), (3.7e-7, "3.7e-07"), (None, "-")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text
