"""`siglit report`: everything known of a run on one page, runs/<name>/report.html, which needs nothing but itself.

Collects what the other commands left in the run's folder, and asks the trained towers for pictures; what is not there
is left out, and the page says which command makes it. What a figure looks like is `report_drawing`, `report_tables` and
the files of siglit/assets.
"""

import base64
import hashlib
import importlib.resources
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

import siglit
from siglit import checkpoints, machine, plot, provenance, report_drawing, report_tables
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.files import atomic_write
from siglit.report_gallery import data_uri, draw_gallery
from siglit.report_results import read_results, read_summary
from siglit.trained import Trained, open_trained

_PACKAGES = ("torch", "lightning", "timm", "transformers", "faiss-cpu", "h5py", "numpy", "pillow")


@dataclass(frozen=True)
class _Panel:
    title: str
    columns: Mapping[str, str]
    """{column of metrics.csv: what it is called}."""
    log: bool = False
    unit: float = 1.0
    """What the column's values are multiplied by."""


_PANELS = (
    _Panel("Loss", {"train/loss": "loss"}, log=True),
    _Panel(
        "Held-out R@1, per cent",
        {"val/text_to_image/R@1": "text → image", "val/image_to_text/R@1": "image → text"},
        unit=100.0,
    ),
    _Panel("Learning rate", {"train/lr": "learning rate"}),
    _Panel("Logit scale t", {"train/logit_scale": "t"}),
    _Panel("Logit bias b", {"train/logit_bias": "b"}),
    _Panel("Mean logit", {"train/positive_logit": "positives", "train/negative_logit": "negatives"}),
    _Panel("Gradient norm before clipping", {"train/grad_norm": "all parameters"}, log=True),
)


@dataclass(frozen=True)
class ReportResult:
    """Where the page is."""

    path: str
    verdict: str
    missing: list[str]
    """Commands whose results it has not."""

    def __str__(self) -> str:
        """The path, the best figures, and what could be added."""
        lines = [self.path, self.verdict]
        if self.missing:
            lines.append(f"not on the page yet: what siglit {', '.join(self.missing)} would tell")
        return "\n".join(lines)


def run(experiment: Experiment) -> ReportResult:
    """Write the page.

    Raises:
        UserError: the output folder holds no run, or a result, the summary or metrics.csv is not what it must be.
    """
    assert experiment.output_dir is not None
    folder = Path(experiment.output_dir)
    results = read_results(folder)
    if not (results or checkpoints.exist(folder / "checkpoints") or (folder / "metrics.csv").is_file()):
        raise UserError(f"there is no run in {folder}; run `siglit train` with this experiment, or set --output_dir")
    try:
        trained, why_not = open_trained(experiment), ""
    except UserError as error:
        trained, why_not = None, str(error)
    context = collect(experiment, folder, results, trained)
    context["notes"] += [f"Towers and images are left out: {why_not}"] if why_not else []
    path = folder / "report.html"
    page = render(context)
    with atomic_write(path) as file:
        file.write(page.encode())
    return ReportResult(str(path), context["verdict"], [row["command"] for row in context["missing"]])


def collect(
    experiment: Experiment, folder: Path, results: Mapping[str, dict[str, Any]], trained: Trained | None
) -> dict[str, Any]:
    """What the page shows, as plain values for its template."""
    training = read_summary(folder).get("train") or {}
    columns = plot.read(folder) if (folder / "metrics.csv").is_file() else None
    step = trained.step if trained else training.get("steps")
    gallery = draw_gallery(experiment, trained) if trained else None
    notes = [
        f"{report_tables.title(stem)} was computed at step {result['of']['step']:,}, the run is at step {step:,}: run "
        f"siglit {report_tables.KINDS[stem.partition('-')[0]][1]} again."
        for stem, result in results.items()
        if step is not None and (result.get("of") or {}).get("step") not in (None, step)
    ]
    kinds = {stem.partition("-")[0] for stem in results}
    labelled = trained is None or trained.cache.labels is not None
    as_run = folder / "experiment.yaml"
    if columns == {}:
        notes.append(f"There are no curves: {folder / 'metrics.csv'} has no rows yet.")
    return {
        "name": experiment.name,
        "verdict": report_tables.verdict(results, training.get("metrics") or {}, experiment.eval.paper),
        "facts": _facts(experiment, training, trained, step),
        "notes": notes,
        "tables": report_tables.tables(results, experiment.eval.paper),
        "curves": _curves(columns or {}),
        "languages": report_tables.languages(results),
        "classes": report_tables.classes(results),
        "confusions": [
            {"title": report_tables.title(path.stem), "picture": _png(path)}
            for path in sorted(folder.glob("zeroshot*.png"))
        ],
        "gallery": gallery,
        "logits": [_logits(stem, value) for stem, value in results.items() if stem.startswith("logits")],
        "missing": [
            {"title": title, "command": command}
            for kind, (title, command) in report_tables.KINDS.items()
            if kind not in kinds and (labelled or kind not in report_tables.OF_CLASSES)
        ],
        "config": str(as_run) if as_run.is_file() else "EXPERIMENT.yaml",
        "experiment": as_run.read_text(encoding="utf-8", errors="replace") if as_run.is_file() else "",
        "fingerprint": _indented(trained.cache.fingerprint) if trained else "",
        "made": made_by(),
    }


def render(context: Mapping[str, Any]) -> str:
    """Fill the template; what came from users is escaped, and nothing but the page's own script may run."""
    assets = importlib.resources.files("siglit") / "assets"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("report.html.j2", "report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template)
    filled = page.render(**context, style=Markup(style), script=Markup(script), script_digest=digest)
    return filled.encode(errors="replace").decode()  # JSON may hold half a surrogate pair, which UTF-8 has no place for


def made_by() -> dict[str, str]:
    """Versions, commit, machine and time of now."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    commit = provenance.commit()
    return {
        "siglit": siglit.__version__ + (f", commit {commit}" if commit else ""),
        "packages": ", ".join(f"{name} {version}" for name, version in provenance.versions(_PACKAGES).items()),
        "python": platform.python_version(),
        "machine": f"{machine.cores()} cores of {provenance.processor()}{gpu}",
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
    }


def _facts(
    experiment: Experiment, training: Mapping[str, Any], trained: Trained | None, step: int | None
) -> list[tuple[str, str]]:
    text = experiment.text_tower
    facts = [
        ("mode", experiment.mode),
        ("image tower", experiment.image_tower.model),
        ("text tower", text.pretrained or text.size),
        ("batch", f"{experiment.train.batch_size:,}"),
    ]
    if step is not None:
        facts += [("steps", f"{step:,}"), ("examples seen", f"{step * experiment.train.batch_size:,}")]
    if trained:
        facts.append(("t", f"{trained.logit_scale:.4g}"))
        if experiment.loss.name == "sigmoid":
            facts.append(("b", f"{trained.logit_bias:.4g}"))
    if training:
        facts.append(("last training", f"{training['seconds']:,.0f} s, {training['examples_per_second']:,.0f} pairs/s"))
    return facts


def _curves(columns: Mapping[str, plot.Curve]) -> list[dict[str, Any]]:
    made = []
    for panel in _PANELS:
        series = {
            name: [(step, panel.unit * value) for step, value in columns[column]]
            for column, name in panel.columns.items()
            if column in columns
        }
        if series:
            legend = [(name, f"{points[-1][1]:.4g}") for name, points in series.items()]
            drawing = Markup(report_drawing.curves(panel.title, series, log=panel.log))
            made.append({"title": panel.title, "drawing": drawing, "legend": legend})
    return made


def _logits(stem: str, value: Mapping[str, Any]) -> dict[str, Any]:
    drawn = report_drawing.histogram(
        "Density of the logits of positives and negatives", value["edges"], value["positive"], value["negative"]
    )
    bins = value["calibration"]
    diagram = report_drawing.reliability("Observed share of positives by predicted probability", bins) if bins else ""
    return {
        "title": report_tables.title(stem),
        "histogram": Markup(drawn),
        "reliability": Markup(diagram),
        "value": value,
    }


def _png(path: Path) -> str:
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path} is not a picture in PNG; run `siglit eval-zeroshot` again")
    return data_uri(data, "image/png")


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
