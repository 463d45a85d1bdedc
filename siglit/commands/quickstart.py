"""`siglit quickstart`: precompute, train and evaluate on a generated data set, with no network and no data.

Draws the `shapes` set to the paths of data.train and data.val, then runs the same commands as on any other data.
"""

import importlib.resources
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from siglit.commands.eval_retrieval import RetrievalResult, eval_retrieval
from siglit.commands.precompute import PrecomputeResult, precompute
from siglit.commands.train import TrainResult, train
from siglit.config import Experiment
from siglit.data import shapes
from siglit.errors import UserError
from siglit.evaluation.index import nearest_images
from siglit.reporting.contact_sheet import SheetImage, draw_contact_sheet
from siglit.runs.folder import ensure_folder
from siglit.runs.launch import check_accelerator, check_batch_fits, check_batch_size
from siglit.runs.trained import open_trained
from siglit.runtime.files import atomic_write
from siglit.runtime.progress import Meter
from siglit.training.optim import lr_multiplier, total_steps

_TRAIN_IMAGES, _VAL_IMAGES = 8000, 1000
_QUERIES, _TOP_K = 8, 5


@dataclass(frozen=True)
class QuickstartResult:
    """Results of the commands that the quickstart ran, and where to look."""

    precompute: PrecomputeResult
    train: TrainResult
    retrieval: RetrievalResult
    folder: str
    """The run's folder."""
    picture: str
    """A contact sheet of queries and retrieved images."""
    seconds: float

    def __str__(self) -> str:
        """The results, and what to do next."""
        return (
            f"{self.precompute}\n{self.train}\n\n{self.retrieval}\n\n"
            f"Done in {self.seconds:.0f} s. Look at {self.picture}, and search:\n"
            f'  siglit search "a small red circle above a blue square" -c {self.folder}/experiment.yaml'
        )


def quickstart(experiment: Experiment) -> QuickstartResult:
    """Draw the data, precompute, train, evaluate, and draw queries with their top five images.

    Args:
        experiment: as in configs/quickstart.yaml.

    Raises:
        UserError: the experiment does not fit the generated data, or one of its stages would refuse it.
    """
    start = time.monotonic()
    if experiment.data.val is None or experiment.image_tower.weights is None:
        raise UserError(
            "quickstart needs an experiment with data.val and image_tower.weights, like configs/quickstart.yaml"
        )
    asset = importlib.resources.files("siglit") / "assets" / "shapes_vit.safetensors"
    for split, spec in (("train", experiment.data.train), ("val", experiment.data.val)):
        if spec.format != "jsonl":
            raise UserError(
                f"data.{split}.format is {spec.format}, but quickstart draws its own images and lists them as jsonl; "
                "for your own images, run `siglit precompute` and `siglit train`"
            )
    _check_training(experiment)
    weights = Path(experiment.image_tower.weights)
    if weights.exists() and not (weights.is_file() and weights.read_bytes() == asset.read_bytes()):
        raise UserError(
            f"quickstart writes its weights to image_tower.weights, but {weights} holds others; name a new file"
        )
    weights.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(weights) as file:
        file.write(asset.read_bytes())
    scenes = shapes.draw_scenes(_TRAIN_IMAGES + _VAL_IMAGES, experiment.seed)
    _draw(Path(experiment.data.train.path), scenes[:_TRAIN_IMAGES], (experiment.seed, 0))
    _draw(Path(experiment.data.val.path), scenes[_TRAIN_IMAGES:], (experiment.seed, 1))
    precomputed = precompute(experiment)
    trained = train(experiment)
    result = eval_retrieval(experiment)
    folder = ensure_folder(experiment.folder)
    picture = folder / "retrieval.png"
    _draw_examples(experiment, Path(experiment.data.val.path).parent).save(picture)
    return QuickstartResult(precomputed, trained, result, str(folder), str(picture), time.monotonic() - start)


def _check_training(experiment: Experiment) -> None:
    """Refuse early, before anything is drawn, what a later stage would refuse."""
    for field, nodes in (("train.nodes", experiment.train.nodes), ("cache.nodes", experiment.cache.nodes)):
        if nodes > 1:
            raise UserError(f"{field} is {nodes}, but quickstart runs on one machine; leave it out")
    if experiment.mode != "locked":
        raise UserError(f"mode is {experiment.mode}, but quickstart runs locked training; leave mode out")
    check_accelerator("cache", experiment.cache.accelerator, experiment.cache.devices)
    check_accelerator("train", experiment.train.accelerator, experiment.train.devices)
    check_accelerator("eval", experiment.eval.accelerator)
    check_batch_size(experiment.train)
    check_batch_fits(experiment.train, _TRAIN_IMAGES)
    steps = total_steps(experiment.train, _TRAIN_IMAGES)
    lr_multiplier(0, experiment.optim, steps, experiment.train.batch_size)  # raises where the schedule does not fit


def _draw(listing: Path, scenes: Iterable[shapes.Scene], seed: tuple[int, int]) -> None:
    """Draw images and a JSON-lines listing, which is written last: the set is complete once it exists."""
    if listing.exists():
        return
    scenes = list(scenes)
    folder = listing.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with Meter(f"drawing {listing}", len(scenes), "images") as meter:
        for number, scene in enumerate(scenes):
            name = f"{folder.name}/{number:05d}.png"
            shapes.draw_image(scene, (*seed, number)).save(listing.parent / name)
            lines.append(json.dumps({"image": name, "caption": shapes.captions(scene)}))
            meter.advance(1)
    with atomic_write(listing) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _draw_examples(experiment: Experiment, folder: Path) -> Image.Image:
    """A contact sheet of held-out captions with their nearest held-out images, which lie in `folder`."""
    trained = open_trained(experiment)
    cache = trained.cache
    targets = np.linspace(0, len(cache) - 1, _QUERIES).astype(int)
    queries = [cache.captions(int(row))[i % 5] for i, row in enumerate(targets)]
    ztxt = trained.encode_text(queries, quiet=True)
    scores, nearest = nearest_images(trained.ensure_exact_index(), ztxt, _TOP_K)
    rows = []
    for number, query in enumerate(queries):
        images = []
        for score, row in zip(scores[number], nearest[number], strict=True):
            with Image.open(folder / cache.keys[int(row)]) as image:
                images.append(SheetImage(image.convert("RGB"), float(score), correct=row == targets[number]))
        rows.append((query, images))
    return draw_contact_sheet(f"Held-out captions and the best {_TOP_K} of {len(cache):,} held-out images", rows)
