"""The quickstart runs from a wheel, without the checkout, the network or a prior run, and again after one."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

import siglit
from siglit.commands import quickstart as stage
from siglit.parsing.arguments import packaged_config
from tests.conftest import ROOT, parse, run_siglit

SMALL = (
    "from siglit.commands import quickstart as q; q._TRAIN_IMAGES, q._VAL_IMAGES = 300, 20; "
    "from siglit.cli import main; main()"
)
FEW_STEPS = ["--train.steps", "3", "--train.val_every", "0", "--optim.warmup_steps", "1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def quickstart(wheel, cwd, *words):
    """Run the unpacked wheel's quickstart, made small."""
    return subprocess.run(
        [sys.executable, "-P", "-c", SMALL, "quickstart", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_configs_and_small_assets(wheel):
    assert (wheel / "siglit/configs/quickstart.yaml").exists()
    assert (wheel / "siglit/configs/examples/folder.yaml").exists()
    assert 0 < (wheel / "siglit/assets/shapes_vit.safetensors").stat().st_size <= 3_000_000
    assert not (wheel / "tests").exists()


@pytest.mark.slow
def test_quickstart_from_the_wheel(wheel, tmp_path):
    done = quickstart(wheel, tmp_path, *FEW_STEPS)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/quickstart"
    metrics = json.loads((folder / "retrieval.json").read_text())
    assert {f"{way}/R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= set(metrics)
    with Image.open(folder / "retrieval.png") as picture:
        assert picture.size[0] > 800
    assert str(ROOT) not in (folder / "experiment.yaml").read_text()
    again = quickstart(wheel, tmp_path, *FEW_STEPS)
    assert again.returncode == 0, again.stderr
    done = subprocess.run(
        [sys.executable, "-P", "-m", "siglit", "search", "a red circle", "-c", "runs/quickstart/experiment.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "val/0" in done.stdout


def test_quickstart_writes_results_and_a_picture(tmp_path, monkeypatch):
    """All of its way, on a few images and in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "_TRAIN_IMAGES", 300)
    monkeypatch.setattr(stage, "_VAL_IMAGES", 20)
    siglit.quickstart(parse("quickstart", *FEW_STEPS, config=packaged_config("quickstart.yaml")))
    assert "text_to_image/R@1" in json.loads((tmp_path / "runs/quickstart/retrieval.json").read_text())
    with Image.open(tmp_path / "runs/quickstart/retrieval.png") as picture:
        assert picture.size[0] > 800


def test_existing_files_are_not_overwritten(tmp_path):
    """Weights that are there stay as they are, and a set of another format gets no images drawn into it."""
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(b"mine")
    for words in (("--image_tower.weights", weights), ("--data.train.format", "xm3600")):
        done = run_siglit("quickstart", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert "quickstart" in done.stderr
    assert weights.read_bytes() == b"mine"
    assert not list(tmp_path.rglob("*.png"))
