"""Small real inputs: pictures with captions in a CSV, and a tiny tower with weights in a file."""

import os

# Before any import that reads it: no test may access the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import siglit
from tests import forks
from tests.ranks import Ranks

ROOT = forks.ROOT

# A shell that runs the tests in the background has Ctrl-C ignored, and every process they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
TOWER = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
"""Values of `device` for a test that runs on every kind of device; "cuda" is skipped where there is none.

A test compares what a device computes with the CPU's float64 or with a naive computation, within what the type's digits
allow: TF32 is off, so float32 is float32 on both. That results are equal bit for bit is only claimed on the CPU.
"""


@pytest.fixture(params=DEVICES)
def device(request):
    """Name of the device that a test computes on."""
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none, before any fixture is made for it."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def gpu_only_for_marked_tests(request):
    """Hide the GPU from all other tests: "auto" is the CPU there, whose results are compared bit for bit."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("cuda"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def pytest_collection_modifyitems(items):
    """Show warnings of what needs a GPU instead of failing: drivers and compilers of each machine have their own."""
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.filterwarnings("default"))


def on(device):
    """Words of a command line that let all stages compute on a device, in float32 unless later words say otherwise."""
    accelerators = [word for stage in ("cache", "train", "eval") for word in (f"--{stage}.accelerator", device)]
    return [*accelerators, "--train.precision", "32-true", "--image_tower.precision", "fp32"]


def run_siglit(*words, cwd, check=None, env=None, **options):
    """Run the command as a user would, in a separate process: a fork, unless there are options for subprocess.run."""
    words = [*map(str, words)]
    if options:
        command, env = [sys.executable, "-m", "siglit", *words], {**os.environ, **forks.ENV, **(env or {})}
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False, **options
        )
    else:
        done = forks.run(words, cwd, env or {})
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_pictures(folder, count, seed=0, start=0):
    """Write `count` pictures of one color each with noise, and a CSV of two captions a picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = ["filepath,title"]
    for number in range(start, start + count):
        name = list(COLORS)[number % len(COLORS)]
        pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 12, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:04d}.png")
        lines += [f"images/{number:04d}.png,a {name} square", f"images/{number:04d}.png,picture {number} is {name}"]
    return lines


@pytest.fixture(scope="session", autouse=True)
def shown_messages():
    """Write siglit's log messages to stderr, as the command does, also where a test calls functions."""
    from siglit.cli import show_messages

    show_messages()


@pytest.fixture(scope="session")
def ranks():
    """Processes to be the ranks of gloo groups, started once for all tests."""
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def tower_weights(tmp_path_factory):
    """A tiny ViT's random weights in a safetensors file."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(TOWER["model"], num_classes=10, **TOWER["model_args"])
    path = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tower_weights):
    """The folder that tests copy from, made once: the project, its caches and a run of it; no test changes it.

    The cached rows are checked in commands/test_precompute.py, the training in commands/test_train.py.
    """
    import siglit

    folder = make_project(tmp_path_factory.mktemp("prepared"), tower_weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        siglit.precompute(parse("precompute"))
        siglit.train(parse("train"))
    return folder


@pytest.fixture
def project(tmp_path, prepared):
    """A folder with train.csv (40 pictures), val.csv (12) and an experiment.yaml that trains in seconds."""
    for name in ("images", "train.csv", "val.csv", "experiment.yaml"):
        copy(prepared / name, tmp_path)
    return tmp_path


def copy(path, folder):
    """Copy a file or a folder into another folder."""
    if path.is_dir():
        shutil.copytree(path, folder / path.name)
    else:
        shutil.copy(path, folder)


def make_project(tmp_path, tower_weights):
    """Fill a folder for `project`."""
    (tmp_path / "train.csv").write_text("\n".join(make_pictures(tmp_path, 40)) + "\n")
    (tmp_path / "val.csv").write_text("\n".join(make_pictures(tmp_path, 12, seed=1, start=40)) + "\n")
    (tmp_path / "experiment.yaml").write_text(
        f"""
name: small
data:
  train: {{format: csv, path: train.csv}}
  val: {{format: csv, path: val.csv}}
  workers: 1
image_tower:
  model: {TOWER["model"]}
  weights: {tower_weights}
  model_args: {{img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
cache: {{shard_size: 8, batch_size: 5, accelerator: cpu}}
tokenizer: {{vocab_size: 320, length: 8}}
text_tower: {{width: 32, depth: 1, heads: 2}}
optim: {{name: adamw, lr: 0.003, warmup_steps: 2}}
train: {{batch_size: 16, steps: 6, log_every: 2, val_every: 3, accelerator: cpu}}
eval: {{accelerator: cpu}}
"""
    )
    return tmp_path


@pytest.fixture(scope="session")
def classed_run(tmp_path_factory, tower_weights):
    """A project whose pictures are labelled by their color, with its caches and a trained run; no test changes it."""
    folder = make_project(tmp_path_factory.mktemp("classed"), tower_weights)
    for name in ("train.csv", "val.csv"):
        head, *lines = (folder / name).read_text().splitlines()
        labelled = [f"{line},{int(line[7:11]) % len(COLORS)}" for line in lines]
        (folder / name).write_text("\n".join([f"{head},color", *labelled]) + "\n")
    text = (folder / "experiment.yaml").read_text()
    (folder / "experiment.yaml").write_text(text.replace(".csv}", ".csv, label_column: color}"))
    (folder / "colors.json").write_text(json.dumps(list(COLORS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        siglit.precompute(parse("precompute"))
        siglit.train(parse("train", "--train.steps", "100", "--train.val_every", "0"))
    return folder


@pytest.fixture
def classed(classed_run, monkeypatch):
    """The folder of `classed_run`, where the test works."""
    monkeypatch.chdir(classed_run)
    return classed_run


@pytest.fixture
def experiment(project, monkeypatch):
    """The project's experiment, parsed; the test works in its folder."""
    monkeypatch.chdir(project)
    return parse("train")


@pytest.fixture
def cached(experiment, prepared, project):
    """The project's experiment, with its caches."""
    copy(prepared / "cache", project)
    (project / "runs/small").mkdir(parents=True)
    summary = json.loads((prepared / "runs/small/summary.json").read_text())
    (project / "runs/small/summary.json").write_text(json.dumps({"precompute": summary["precompute"]}))
    return experiment


@pytest.fixture
def trained(cached, prepared, project):
    """The project's experiment, cached and trained for its 6 steps."""
    shutil.rmtree(project / "runs")
    copy(prepared / "runs", project)
    return cached


def parse(command, *words, config="experiment.yaml"):
    """Parse a command line as the command does."""
    from siglit.parsing.arguments import parse_command

    return parse_command(command, ["-c", config, *words])[0]
