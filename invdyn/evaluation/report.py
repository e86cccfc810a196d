"""Write an evaluation down: `metrics.json`, pictures, and one `report.html` that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from invdyn.errors import DataError
from invdyn.evaluation.findings import warnings
from invdyn.evaluation.page import (
    heading,
    paragraph,
    render_cards,
    render_facts,
    render_page,
    render_picture,
    render_table,
    render_warnings,
    side_by_side,
)
from invdyn.evaluation.plots import (
    plot_calibration,
    plot_error_per_dim,
    plot_predicted_against_true,
    plot_quality_against_steps,
    plot_training_curve,
)
from invdyn.evaluation.results import Evaluation, to_plain
from invdyn.evaluation.summary import (
    dimension_table,
    distribution_explanations,
    distribution_table,
    explanations,
    headline_cards,
    summary_table,
)
from invdyn.transitions.store import TransitionStore, write_json
from invdyn.url_path import AnyPath, as_path, write_whole

REPORT_FILE = "report.html"
METRICS_FILE = "metrics.json"
WRITABLE = ".writable"
Sections = Mapping[str, Mapping[str, object]]


def write_report(
    evaluation: Evaluation,
    output: str | AnyPath,
    *,
    title: str,
    sections: Sections,
    extra_warnings: Sequence[str] = (),
    metrics_csv: AnyPath | None = None,
) -> AnyPath:
    """Write `metrics.json`, the pictures and `report.html` into a folder, replacing those of an earlier report.

    Args:
        evaluation: what was found.
        output: folder, made when missing.
        title: name of the model, shown on top.
        sections: facts about the dataset, the checkpoint and so on: section to name to value.
        extra_warnings: what the caller knows beyond the evaluation.
        metrics_csv: the run's training metrics, drawn when the file exists.

    Returns:
        Path of `report.html`.

    Raises:
        DataError: when the folder cannot be written.
        StorageError: when a storage service does not take the files.
    """
    output = as_path(output)
    found = [*extra_warnings, *warnings(evaluation)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        pictures = _draw(evaluation, output, metrics_csv)
        page = render_page(title, _blocks(evaluation, title, sections, found, pictures))
        write_whole(output / REPORT_FILE, page)
    except OSError as error:
        raise _not_written(output, error) from None
    facts = {"title": title, "warnings": found, **evaluation.to_json(), "sections": sections}
    write_json(str(output / METRICS_FILE), to_plain(facts))
    return output / REPORT_FILE


def make_folder(output: AnyPath) -> None:
    """Make the folder of a report where it is missing, and check that files can be written to it.

    Raises:
        DataError: when they cannot.
        StorageError: when a storage service does not take them.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / WRITABLE, "")
        (output / WRITABLE).unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(output, error) from None


def _not_written(output: AnyPath, error: OSError) -> DataError:
    return DataError(f"cannot write the report to {output}: {error}; free some space or give --output")


def dataset_facts(store: TransitionStore, split: str) -> dict[str, object]:
    """Return what a report says about a dataset."""
    manifest = store.manifest
    rows = ", ".join(
        f"{name} {info['rows']:,} ({info['episodes']:,} episodes)" for name, info in manifest["splits"].items()
    )
    recording = manifest["recording"]
    facts: dict[str, object] = {
        "name": manifest["name"],
        "path": store.path,
        "rows": rows,
        "evaluated split": split,
        "row": f"state {store.state_dim}, action {store.action_dim}, history {store.history}, horizon {store.horizon}, "
        f"gap {store.gap}",
        "content hash": store.content_hash,
    }
    return facts | {f"recording: {name}": value for name, value in recording.items()}


def _blocks(
    evaluation: Evaluation,
    title: str,
    sections: Sections,
    found: Sequence[str],
    pictures: Sequence[tuple[AnyPath, str]],
) -> list[str]:
    rows = f"{evaluation.num_rows:,} transitions of the {evaluation.split} split"
    blocks = [
        heading(f"Evaluation: {title}", level=1),
        paragraph(f"Which action took state s to next state s'? Answered for {rows}.", soft=True),
        render_warnings(found),
        render_cards(headline_cards(evaluation)),
        heading("All models on the same rows"),
        render_table(summary_table(evaluation)),
        paragraph("Best of each column in colour; the shaded row is the model as it predicts by default.", soft=True),
        render_facts(dict(explanations(evaluation))),
        heading("As distributions"),
        paragraph("Every model at its own number of steps."),
        render_table(distribution_table(evaluation)),
        render_facts(dict(distribution_explanations(evaluation))),
        heading("Each action dimension"),
        paragraph(f"{evaluation.default_of(evaluation.subject).label}; errors and widths in the units of the action."),
        render_table(dimension_table(evaluation)),
        heading("Plots"),
        side_by_side(render_picture(path, caption) for path, caption in pictures),
    ]
    for name, facts in sections.items():
        blocks += [heading(name), render_facts(facts)]
    return blocks


def _draw(evaluation: Evaluation, output: AnyPath, metrics_csv: AnyPath | None) -> list[tuple[AnyPath, str]]:
    best = evaluation.best_of(evaluation.subject).label
    pictures = []
    path = output / "quality_against_steps.png"
    if plot_quality_against_steps(evaluation, path):
        pictures.append((path, "Quality against the number of network evaluations, next to models without a solver."))
    plot_calibration(evaluation, output / "calibration.png")
    pictures.append(
        (
            output / "calibration.png",
            "Calibration: a region of probability q should hold the action in a share q of rows.",
        )
    )
    plot_error_per_dim(evaluation, output / "error_per_dim.png")
    pictures.append((output / "error_per_dim.png", "Error of each action dimension, every model at its best steps."))
    plot_predicted_against_true(evaluation, output / "predicted_against_true.png")
    pictures.append((output / "predicted_against_true.png", f"Predicted against recorded actions: {best}, one sample."))
    path = output / "training_curve.png"
    if metrics_csv is not None and plot_training_curve(metrics_csv, path):
        pictures.append((path, "Loss while training."))
    return pictures
