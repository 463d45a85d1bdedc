"""A study at toy size: the same arms on a few drawn images for two steps, to see that all of its runs work.

Keeps what a study is about, such as losses, optimizers and corruptions, and replaces data, towers and lengths.
"""

import importlib.resources
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from siglit.data import shapes
from siglit.parsing.arguments import packaged_config
from siglit.runtime.files import atomic_write
from siglit.studies.definition import Study
from siglit.studies.grid import base_fields

_IMAGES, _STEPS, _BATCH = {"train": 64, "val": 48}, 2, 16
_CLASSES = list(shapes.SHAPES[:4])
_REPLACED = ("data.train.", "data.val.", "cache.", "image_tower.", "tokenizer.", "text_tower.", "eval.")
_LENGTHS = (
    *("train.examples", "train.epochs", "train.steps", "train.micro_batch_size", "train.devices", "train.nodes"),
    *("optim.warmup_examples", "optim.warmup_steps", "optim.cooldown_examples", "optim.cooldown_steps"),
)
_KEPT = ("image_tower.center", "image_tower.head", "text_tower.embedding_width")
_OF_THE_STUDY = ("name", "output_dir", "seed")


def smoke_study(study: Study, folder: Path) -> Study:
    """Return the study at toy size, with one seed and one learning rate, after drawing its data into the folder."""
    for split, count in _IMAGES.items():
        _draw(folder / f"{split}.jsonl", count)
    (folder / "classes.json").write_text(json.dumps(_CLASSES), encoding="utf-8")
    # The fields of a point's own base are below those of all axes.
    own = {*study.set, *(name for points in study.axes.values() for fields in points.values() for name in fields)}
    axes = {
        axis: {point: _reduced({**_base_of(study, fields, own), **fields}) for point, fields in points.items()}
        for axis, points in study.axes.items()
    }
    return replace(
        study,
        base=Path(packaged_config("quickstart.yaml")),
        set={**_data(folder), **_reduced(base_fields(study.base)), **_reduced(study.set)},
        axes=axes,
        test={"eval.name": "test"} if len(study.test) > 0 else {},
        seeds=1,
        learning_rates=study.learning_rates[:1],
        full={},
    )


def _data(folder: Path) -> dict[str, Any]:
    """Fields of the data and the towers."""
    columns = {"format": "jsonl", "label_column": "label", "lang_column": "language"}
    fields = {f"data.{split}.{name}": value for split in _IMAGES for name, value in columns.items()}
    fields |= {f"data.{split}.path": str(folder / f"{split}.jsonl") for split in _IMAGES}
    return fields | {
        "cache.path": str(folder / "cache"),
        "image_tower.weights": str(importlib.resources.files("siglit") / "assets" / "shapes_vit.safetensors"),
        "tokenizer.vocab_size": 400,
        "tokenizer.length": 16,
        "text_tower.depth": 1,
        "optim.warmup_steps": 0,
        "train.steps": _STEPS,
        "train.batch_size": _BATCH,
        "train.val_every": 0,
        "eval.classes": str(folder / "classes.json"),
        "eval.shots": [1, 5, 10],
        "eval.seeds": 1,
    }


def _base_of(study: Study, point: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Fields of a point's own base that the study leaves as they are; empty if the point has none."""
    fields = base_fields(study.path.parent / point["base"]) if "base" in point else {}
    return {name: value for name, value in fields.items() if name not in own}


def _reduced(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a study is about, as they are at toy size."""
    kept = {
        name: value
        for name, value in fields.items()
        if name in _KEPT or not (name.startswith(_REPLACED) or name in (*_LENGTHS, *_OF_THE_STUDY, "base", "test"))
    }
    if isinstance(batch := kept.get("train.batch_size"), int):
        kept["train.batch_size"] = min(_BATCH, batch)
    if kept.get("train.keep_every"):
        kept["train.keep_every"] = 1
    return kept


def _draw(listing: Path, count: int) -> None:
    """Draw images, and a listing with a label and a language for each."""
    images = listing.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(shapes.draw_scenes(count, len(listing.name))):
        shapes.draw_image(scene, number).save(images / f"{number}.png")
        line = {"image": f"{images.name}/{number}.png", "caption": shapes.captions(scene)}
        lines.append(json.dumps({**line, "label": number % len(_CLASSES), "language": "en"}))
    with atomic_write(listing) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
