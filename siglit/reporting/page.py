"""The page of `siglit report`: collects the contents of a run's folder and fills the HTML template with them.

`svg.py`, `tables.py` and `gallery.py` prepare the parts; page.html.j2, page.css and page.js lay them out.
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
from siglit.config import Experiment, TextTowerConfig
from siglit.errors import UserError
from siglit.reporting import curves, svg, tables
from siglit.reporting.gallery import collect_examples, data_uri
from siglit.reporting.results import read_summary
from siglit.runs.trained import TrainedRun
from siglit.runtime import machine, provenance

_PACKAGES = ("torch", "lightning", "timm", "transformers", "faiss-cpu", "h5py", "numpy", "pillow")


@dataclass(frozen=True)
class _CurvePanel:
    title: str
    columns: Mapping[str, str]
    """{column of metrics.csv: name in the legend}."""
    log: bool = False
    """Logarithmic y axis."""
    factor: float = 1.0
    """The values are multiplied by it."""


_PANELS = (
    _CurvePanel("Loss", {"train/loss": "loss"}, log=True),
    _CurvePanel(
        "Held-out R@1, percent",
        {"val/text_to_image/R@1": "text → image", "val/image_to_text/R@1": "image → text"},
        factor=100.0,
    ),
    _CurvePanel("Learning rate", {"train/lr": "learning rate"}),
    _CurvePanel("Logit scale t", {"train/logit_scale": "t"}),
    _CurvePanel("Logit bias b", {"train/logit_bias": "b"}),
    _CurvePanel("Mean logit", {"train/positive_logit": "positives", "train/negative_logit": "negatives"}),
    _CurvePanel("Gradient norm before clipping", {"train/grad_norm": "all parameters"}, log=True),
)


def collect(
    experiment: Experiment, folder: Path, results: Mapping[str, dict[str, Any]], trained: TrainedRun | None
) -> dict[str, Any]:
    """The values that the page's template shows.

    Raises:
        UserError: summary.json or metrics.csv is malformed.
    """
    training = read_summary(folder).get("train") or {}
    columns = curves.read_metrics_csv(folder) if (folder / "metrics.csv").is_file() else None
    step = trained.step if trained is not None else training.get("steps")
    gallery = collect_examples(experiment, trained) if trained is not None else None
    notes = [
        f"{tables.title(stem)} was computed at step {at:,}, but the run is at step {step:,}: rerun "
        f"siglit {tables.KINDS[stem.partition('-')[0]][1]}."
        for stem, result in results.items()
        if step is not None and (at := tables.step_of(result)) not in (None, step)
    ]
    kinds = {stem.partition("-")[0] for stem in results}
    labelled = trained is None or trained.cache.labels is not None
    as_run = folder / "experiment.yaml"
    if columns == {}:
        notes.append(f"Curves are not shown: {folder / 'metrics.csv'} has no rows yet.")
    return {
        "name": experiment.name,
        "summary": tables.summary_line(results, training.get("metrics") or {}, experiment.eval.paper),
        "facts": _facts(experiment, training, trained, step),
        "notes": notes,
        "tables": tables.metric_tables(results, experiment.eval.paper),
        "curves": _curves(columns or {}),
        "languages": tables.languages(results),
        "classes": tables.classes(results),
        "confusions": [
            {"title": tables.title(path.stem), "image": _read_png(path)}
            for path in sorted(folder.glob("zeroshot*.png"))
        ],
        "gallery": gallery,
        "logits": [_logits(stem, value) for stem, value in results.items() if stem.startswith("logits")],
        "missing": [
            {"title": title, "command": command}
            for kind, (title, command) in tables.KINDS.items()
            if kind not in kinds and (labelled or kind not in tables.NEED_LABELS)
        ],
        "config": str(as_run) if as_run.is_file() else "EXPERIMENT.yaml",
        "experiment": as_run.read_text(encoding="utf-8", errors="replace") if as_run.is_file() else "",
        "fingerprint": _format_json(trained.cache.fingerprint) if trained is not None else "",
        "environment": environment(),
    }


def render(context: Mapping[str, Any]) -> str:
    """Fill the template; values are escaped, and the content security policy allows no script but the page's own."""
    assets = importlib.resources.files("siglit") / "reporting"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = engine.from_string(template).render(
        **context, style=Markup(style), script=Markup(script), script_digest=digest
    )
    return page.encode(errors="replace").decode()  # JSON may hold lone surrogates, which UTF-8 cannot encode


def environment() -> dict[str, str]:
    """Versions, commit, machine and current time."""
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
        ("text tower", text.pretrained or _size(text)),
        ("batch", f"{experiment.train.batch_size:,}"),
    ]
    if step is not None:
        facts += [("steps", f"{step:,}"), ("examples seen", f"{step * experiment.train.batch_size:,}")]
    if trained is not None:
        facts.append(("t", f"{trained.logit_scale:.4g}"))
        if experiment.loss.name == "sigmoid":
            facts.append(("b", f"{trained.logit_bias:.4g}"))
    if len(training) > 0:
        facts.append(("last training", f"{training['seconds']:,.0f} s, {training['examples_per_second']:,.0f} pairs/s"))
    return facts


def _size(config: TextTowerConfig) -> str:
    """The preset, and what the experiment sets apart from it."""
    own = {"width": config.width, "depth": config.depth, "heads": config.heads}
    parts = [f"{name} {value}" for name, value in own.items() if value is not None]
    return config.size if len(parts) == 0 else ", ".join(parts if len(parts) == len(own) else [config.size, *parts])


def _curves(columns: Mapping[str, curves.Curve]) -> list[dict[str, Any]]:
    drawn = []
    for panel in _PANELS:
        series = {
            name: [(step, panel.factor * value) for step, value in columns[column]]
            for column, name in panel.columns.items()
            if column in columns
        }
        if len(series) > 0:
            legend = [(name, f"{points[-1][1]:.4g}") for name, points in series.items()]
            drawing = Markup(svg.curves(panel.title, series, log=panel.log))
            drawn.append({"title": panel.title, "drawing": drawing, "legend": legend})
    return drawn


def _logits(stem: str, value: Mapping[str, Any]) -> dict[str, Any]:
    histogram = svg.histogram(
        "Density of the logits of positives and negatives", value["edges"], value["positive"], value["negative"]
    )
    bins = value["calibration"]
    label = "Observed share of positives by predicted probability"
    reliability = svg.reliability(label, bins) if len(bins) > 0 else ""
    return {
        "title": tables.title(stem),
        "histogram": Markup(histogram),
        "reliability": Markup(reliability),
        "value": value,
    }


def _read_png(path: Path) -> str:
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path} is not a PNG file; rerun `siglit eval-zeroshot`")
    return data_uri(data, "image/png")


def _format_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
