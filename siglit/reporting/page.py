"""The page of `siglit report`: what the run's folder holds, put into one HTML template.

What a figure looks like is `svg.py`, `tables.py`, `gallery.py` and the template and styles beside this file.
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
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.reporting import curves, svg, tables
from siglit.reporting.gallery import data_uri, draw_gallery
from siglit.reporting.results import read_summary
from siglit.runs.trained import TrainedRun
from siglit.runtime import machine, provenance

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


def collect(
    experiment: Experiment, folder: Path, results: Mapping[str, dict[str, Any]], trained: TrainedRun | None
) -> dict[str, Any]:
    """What the page shows, as plain values for its template."""
    training = read_summary(folder).get("train") or {}
    columns = curves.read_metrics_csv(folder) if (folder / "metrics.csv").is_file() else None
    step = trained.step if trained else training.get("steps")
    gallery = draw_gallery(experiment, trained) if trained else None
    notes = [
        f"{tables.title(stem)} was computed at step {result['of']['step']:,}, the run is at step {step:,}: run "
        f"siglit {tables.KINDS[stem.partition('-')[0]][1]} again."
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
        "verdict": tables.verdict(results, training.get("metrics") or {}, experiment.eval.paper),
        "facts": _facts(experiment, training, trained, step),
        "notes": notes,
        "tables": tables.tables(results, experiment.eval.paper),
        "curves": _curves(columns or {}),
        "languages": tables.languages(results),
        "classes": tables.classes(results),
        "confusions": [
            {"title": tables.title(path.stem), "picture": _png(path)} for path in sorted(folder.glob("zeroshot*.png"))
        ],
        "gallery": gallery,
        "logits": [_logits(stem, value) for stem, value in results.items() if stem.startswith("logits")],
        "missing": [
            {"title": title, "command": command}
            for kind, (title, command) in tables.KINDS.items()
            if kind not in kinds and (labelled or kind not in tables.OF_CLASSES)
        ],
        "config": str(as_run) if as_run.is_file() else "EXPERIMENT.yaml",
        "experiment": as_run.read_text(encoding="utf-8", errors="replace") if as_run.is_file() else "",
        "fingerprint": _indented(trained.cache.fingerprint) if trained else "",
        "made": made_by(),
    }


def render(context: Mapping[str, Any]) -> str:
    """Fill the template; what came from users is escaped, and nothing but the page's own script may run."""
    assets = importlib.resources.files("siglit") / "reporting"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")
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
    experiment: Experiment, training: Mapping[str, Any], trained: TrainedRun | None, step: int | None
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


def _curves(columns: Mapping[str, curves.Curve]) -> list[dict[str, Any]]:
    made = []
    for panel in _PANELS:
        series = {
            name: [(step, panel.unit * value) for step, value in columns[column]]
            for column, name in panel.columns.items()
            if column in columns
        }
        if series:
            legend = [(name, f"{points[-1][1]:.4g}") for name, points in series.items()]
            drawing = Markup(svg.curves(panel.title, series, log=panel.log))
            made.append({"title": panel.title, "drawing": drawing, "legend": legend})
    return made


def _logits(stem: str, value: Mapping[str, Any]) -> dict[str, Any]:
    drawn = svg.histogram(
        "Density of the logits of positives and negatives", value["edges"], value["positive"], value["negative"]
    )
    bins = value["calibration"]
    diagram = svg.reliability("Observed share of positives by predicted probability", bins) if bins else ""
    return {
        "title": tables.title(stem),
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
