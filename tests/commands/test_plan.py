"""Planning: counts are the real module's, the predicted peak is what the kernel sees, recipes are the paper's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import siglit
from siglit.commands.plan import _digits, _disk_fields
from siglit.config import LossConfig, TrainConfig
from siglit.errors import UserError
from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.parsing.arguments import parse_command
from siglit.planning.largest_batch import largest_batches
from siglit.planning.memory import BytesByPairs, MemoryEstimate, TowerMemory, _LiveBytes, _loss_memory
from siglit.planning.throughput import ThroughputMeasurement
from tests.conftest import ROOT, parse, run_siglit

RECIPES = sorted((ROOT / "configs" / "reproductions").glob("*.yaml"))
# Those of configs/evaluation are laid over an experiment, see test_evaluation_configs.py.
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "evaluation" and path not in STUDIES
)

MEASURE = """
import ctypes, gc, sys, warnings
from pathlib import Path
import lightning.pytorch as pl
from siglit.parsing.arguments import parse_command
from siglit.planning.memory import RandomDataModule
from siglit.training.module import SigLiT
from siglit.runs.launch import quiet_lightning

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def train(experiment, pairs):
    data = RandomDataModule(experiment)
    data.train_dataloader = lambda: (data.batch(pairs) for _ in range(2))
    data.val_dataloader = lambda: []
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    precision = experiment.train.precision
    pl.Trainer(accelerator="cpu", max_epochs=1, precision=precision, limit_val_batches=0, **options).fit(
        SigLiT(experiment, 100), datamodule=data)

quiet_lightning()
warnings.simplefilter("ignore")
experiment = parse_command("train", sys.argv[1:])[0]
train(experiment, 2)
# What that one leaves lies in cycles; freed during the next, it would be taken off what that one needs.
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
train(experiment, experiment.train.batch_size)
print(status("VmHWM") - before)
"""

TEXT = """
name: measured
output_dir: {folder}/run
data: {{train: {{format: csv, path: none.csv}}}}
image_tower:
  model: vit_tiny_patch16_224
  model_args: {{img_size: 32, patch_size: 4, embed_dim: 96, depth: 4, num_heads: 3}}
tokenizer: {{vocab_size: 2000, length: 48}}
text_tower: {{width: 256, depth: 4, heads: 4}}
optim: {{lr: 1.0e-4}}
train: {{batch_size: 128, steps: 10, accelerator: cpu, precision: 32-true}}
"""


@pytest.fixture
def small(tmp_path):
    """An experiment file of a run in which activations outweigh the weights; its data do not exist."""
    path = tmp_path / "experiment.yaml"
    path.write_text(TEXT.format(folder=tmp_path))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
@pytest.mark.parametrize(
    "words",
    [
        ["--optim.name", "lion"],
        ["--optim.name", "adamw", "--text_tower.width", "384", "--train.micro_batch_size", "64"],
        [
            "--mode",
            "scratch",
            "--text_tower.width",
            "64",
            "--optim.name",
            "adafactor",
            "--train.precision",
            "bf16-mixed",
        ],
        ["--mode", "unlocked", "--text_tower.width", "64", "--train.micro_batch_size", "64"],
        ["--mode", "scratch", "--text_tower.width", "64", "--loss.name", "softmax"],
    ],
    ids=" ".join,
)
def test_predicted_peak_is_within_15_percent_of_the_measured_one(small, words):
    """The kernel's high-water mark of resident memory over two real training steps in a process of its own."""
    from siglit.planning.memory import estimate_memory

    # Otherwise malloc keeps what was freed for later, up to as much again: what it wastes is not what a step needs.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "-c", str(small), *words],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1])
    experiment = parse("train", *words, config=str(small))
    counted = estimate_memory(experiment, device="cpu", precision=experiment.train.precision)
    predicted = counted.peak(experiment.train.micro_batch_size)
    assert measured > 50 * 2**20  # or the process itself would be what is measured
    assert predicted == pytest.approx(measured, rel=0.15), (
        f"predicted {predicted / 1e6:.0f} MB, saw {measured / 1e6:.0f}"
    )


@pytest.mark.slow
def test_counts_are_those_of_the_real_module(small):
    """Parameters, and the state after a real optimizer step, of a module with numbers."""
    from siglit.planning.memory import RandomDataModule, estimate_memory
    from siglit.training.module import SigLiT

    for name in ("lion", "adamw", "adafactor"):
        experiment = parse("train", "--optim.name", name, "--mode", "scratch", config=str(small))
        counted = estimate_memory(experiment, device="cpu", precision="32-true")
        module = SigLiT(experiment, 10)
        module.build(RandomDataModule(experiment))
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = module.configure_optimizers()["optimizer"]
        optimizer.step()
        state = [v for of_one in optimizer.state.values() for v in of_one.values() if isinstance(v, torch.Tensor)]
        assert counted.weights == sum(p.nbytes for p in module.parameters())
        assert counted.gradients == sum(p.nbytes for p in module.parameters() if p.requires_grad)
        assert counted.optimizer == sum(tensor.nbytes for tensor in state)
        assert counted.parameters["text tower"] == sum(p.numel() for p in module.text_tower.parameters())


def test_the_proposed_micro_batch_fits_and_twice_as_many_pairs_do_not(small):
    from siglit.planning.memory import estimate_memory

    experiment = parse("train", config=str(small))
    counted = estimate_memory(experiment, device="cpu", precision="32-true")
    assert counted.largest_micro_batch(counted.peak(None)) == 128
    budget = counted.peak(32) + 1000
    assert counted.largest_micro_batch(budget) == 32
    assert counted.peak(64) > budget
    assert counted.largest_micro_batch(1000) is None


@pytest.mark.slow
def test_command_measures_here_and_leaves_plan_json(small, tmp_path):
    """Without data, weights or tokenizer; the time follows from the measured rate, and devices share it."""
    done = run_siglit("plan", "-c", small, "--devices", 2, "--rows", 5000, cwd=tmp_path, check=0)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["throughput"]["pairs"] >= 4
    assert "measured here" in done.stdout
    assert plan["examples"] == 1280
    assert plan["device_hours"] == pytest.approx(1280 / plan["examples_per_second"] / 3600)
    assert plan["days"] == pytest.approx(plan["device_hours"] / 2 / 24)
    assert plan["cache_bytes"] == 5000 * 96 * 2


@pytest.mark.slow
def test_speed_is_measured_with_the_warm_up_and_the_products_of_the_run(small, monkeypatch):
    """A warm-up must fit into the run that is planned, not into the few steps that are timed."""
    from siglit.training.module import SigLiT

    seen = set()
    real = SigLiT.embed
    recorded = lambda self, batch: (seen.add(torch.get_float32_matmul_precision()), real(self, batch))[1]  # noqa: E731
    monkeypatch.setattr(SigLiT, "embed", recorded)
    words = ("--optim.warmup_steps", "20000", "--train.steps", "50000", "--train.matmul_precision", "high")
    plan = siglit.plan(parse("plan", *words, config=str(small)))
    assert plan.throughput.pairs >= 4
    assert seen == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_batch_that_devices_cannot_share_is_refused(small, tmp_path):
    done = run_siglit("plan", "-c", small, "--devices", 3, cwd=tmp_path, check=2)
    assert "cannot be shared evenly by 3 devices" in done.stderr


def test_a_damaged_cache_raises(small, tmp_path):
    """It is not counted as none, which would hide it until training."""
    index = tmp_path / "cache" / "measured" / "train" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{")
    done = run_siglit("plan", "-c", small, "--examples-per-second", 10, cwd=tmp_path, check=2)
    assert "index.json" in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_file_parses_and_its_model_is_one_of_timms(path):
    import timm

    model = parse("train", config=str(path)).image_tower.model
    assert model in timm.list_pretrained() or timm.is_model(model) or model.startswith("local-dir:")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "siglit_b8_l12" else pytest.mark.slow)
        for path in RECIPES
    ],
)
def test_recipe_fits_four_devices_of_80_gib_as_it_stands(path, tmp_path, monkeypatch):
    """Nothing is computed, so the largest towers are planned in seconds."""
    monkeypatch.chdir(tmp_path)
    plan = siglit.plan(parse("plan", config=str(path)), gpu_memory=80, examples_per_second=1000)
    assert plan.devices == 4
    assert plan.micro_batch_size is not None
    assert (plan.requested_micro_batch_size or plan.pairs_per_device) <= plan.micro_batch_size
    assert "GiB: fits" in str(plan)


@pytest.mark.parametrize(
    ("name", "batch", "steps"),
    [
        ("siglit_b8_l12", 32 * 1024, 65_000),
        ("siglit_g14_l", 20 * 1024, 107_000),
        ("siglip_b16_unlocked", 16 * 1024, 2_400_000_000 // (16 * 1024)),
        ("siglip_b16_short", 32 * 1024, 3_600_000_000 // (32 * 1024)),
        ("siglip_b16_long", 32 * 1024, 9_000_000_000 // (32 * 1024)),
        ("siglip_batch_sweep", 32 * 1024, 3_000_000_000 // (32 * 1024)),
        ("siglit_batch_sweep", 32 * 1024, 900_000_000 // (32 * 1024)),
        ("siglip_bias", 8 * 1024, 900_000_000 // (8 * 1024)),
        ("siglip_negatives", 16 * 1024, 900_000_000 // (16 * 1024)),
        ("siglip_noise", 16 * 1024, 3_600_000_000 // (16 * 1024)),
        ("siglip_vocabulary", 8 * 1024, 900_000_000 // (8 * 1024)),  # the paper states no batch
        ("msiglip", 32 * 1024, 30_000_000_000 // (32 * 1024)),
    ],
)
def test_recipe_is_as_long_as_the_papers(name, batch, steps):
    """arXiv:2303.15343v4, Table 1, sections 4.3 to 4.5 and 4.7 to 4.9, Tables 5 and 8."""
    from siglit.training.optim import total_steps

    train = parse("train", config=str(ROOT / "configs" / "reproductions" / f"{name}.yaml")).train
    assert train.batch_size == batch
    assert total_steps(train, 10**9) == steps


def test_large_numbers_are_written_out():
    assert [_digits(number) for number in (3081.2, 100, 99.96, 2.0581, 0.00123)] == [
        "3,081",
        "100",
        "100",
        "2.06",
        "0.00123",
    ]


def towers(per_pair, fixed=0):
    """A tower whose step keeps and allocates so many bytes per pair."""
    live = BytesByPairs(np.array([float(fixed)]), np.array([float(per_pair)]))
    return TowerMemory(saved=live, forward=live, backward=live)


def estimate(pairs=8, per_pair=1000, dim=64, device="cuda"):
    """An estimate of towers without weights to speak of, as no architecture has to be traced for it."""
    loss = partial(_loss_memory, dim=dim, world_size=4, image_gradient=True, device=device, precision="32-true")
    return MemoryEstimate(
        parameters={},
        weights=5000,
        gradients=5000,
        optimizer=5000,
        largest_parameter=100,
        batch=10 * pairs,
        batch_per_pair=10,
        pairs=pairs,
        dim=dim,
        loss=loss(LossConfig(), pairs),
        loss_memory=loss,
        image=towers(per_pair),
        text=towers(per_pair),
    )


@pytest.mark.parametrize("micro", [None, 1, 4, 6])
@pytest.mark.parametrize("gib", [0.001, 0.1, 3.0, 20.0])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_the_largest_batch_fits_and_the_next_larger_one_does_not(micro, gib, name):
    memory, config, budget = estimate(), LossConfig(name), gib * 2**30
    found = {
        largest.loss: largest
        for largest in largest_batches(memory, config, devices=4, micro_batch_size=micro, budget=budget)
    }
    assert list(found) == ["sigmoid", "softmax"]
    largest, unit = found[name], micro or 1

    def peak(batch_size):
        return memory.with_pairs(batch_size // 4, config).peak(micro)

    assert largest.batch_size % (4 * unit) == 0
    assert largest.batch_size > 0
    assert peak(largest.batch_size) == largest.peak_bytes == sum(largest.part_bytes.values()) <= budget
    assert peak(largest.batch_size + 4 * unit) > budget
    power = largest.power_of_two
    assert power.bit_count() == 1
    assert peak(power) <= budget < peak(2 * power)


def test_what_bounds_the_largest_batch_is_named():
    """Activations of all pairs in one pass; with micro-batches what grows, not the activations, however large."""
    memory, options = estimate(per_pair=10**8), {"devices": 4, "budget": 8 * 2**30}
    one_pass, micro = (largest_batches(memory, LossConfig(), micro_batch_size=m, **options)[0] for m in (None, 64))
    assert one_pass.bounded_by == "activations"
    assert micro.bounded_by == "loss"
    assert micro.part_bytes["activations"] > micro.part_bytes["loss"]
    assert micro.batch_size > 100 * one_pass.batch_size


def test_no_batch_fits_where_the_weights_alone_do_not():
    for largest in largest_batches(estimate(), LossConfig(), devices=4, micro_batch_size=None, budget=100):
        assert (largest.batch_size, largest.power_of_two) == (0, None)
        assert largest.peak_bytes > 100


@pytest.mark.parametrize(
    "config",
    [
        LossConfig("sigmoid"),
        LossConfig("softmax"),
        LossConfig(negatives="hardest", negatives_per_positive=2.0),
        LossConfig(ambiguous="drop"),
    ],
    ids=["sigmoid", "softmax", "negatives", "ids"],
)
def test_memory_of_the_loss_is_what_its_tensors_take(config):
    """Counted while the loss is computed on the CPU, gradients of both sides included."""
    pairs = 1500
    zimg, ztxt = (torch.nn.functional.normalize(torch.randn(pairs, 32)).requires_grad_() for _ in range(2))
    ids = torch.arange(pairs) if config.ambiguous == "drop" else None
    negatives = None if config.negatives == "all" else Negatives("hardest", 2.0)
    with _LiveBytes([zimg, ztxt]) as live:
        if config.name == "sigmoid":
            sigmoid_loss(zimg, ztxt, 10.0, -10.0, image_ids=ids, text_ids=ids, negatives=negatives)
        else:
            softmax_loss(zimg, ztxt, 10.0)
    counted = _loss_memory(config, pairs, 32, world_size=1, image_gradient=True, device="cpu", precision="32-true")
    assert counted.rows + counted.tile == pytest.approx(max(live.history), rel=0.05)


def test_largest_batch_is_printed_and_written_without_a_gpu(small, tmp_path, monkeypatch):
    """The run is planned for GPUs that this machine has not: their speed is not measured on its CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("siglit.commands.plan.estimate_memory", lambda *_, **__: estimate())
    experiment = parse("plan", "--train.accelerator", "auto", config=str(small))
    text = str(siglit.plan(experiment, gpu_memory=2, rows=5000, largest_batch=True))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["throughput"] is plan["examples_per_second"] is plan["days"] is None
    assert plan["steps"] == 10
    assert "set --examples-per-second" in text
    for largest in plan["largest_batches"]:
        assert f"{largest['batch_size']:,}" in text
        assert largest["peak_bytes"] <= 0.9 * 2 * 2**30
    assert [largest["loss"] for largest in plan["largest_batches"]] == ["sigmoid", "softmax"]


def test_largest_batch_of_a_device_of_unknown_memory_is_refused(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    experiment, flags = parse_command("plan", ["-c", str(small), "--largest-batch"])
    with pytest.raises(UserError, match="--largest-batch needs the memory of each device, .* set --gpu-memory"):
        siglit.plan(experiment, **flags)


@pytest.mark.parametrize(("accelerator", "hints"), [("auto", 1), ("cpu", 0)])
def test_a_machine_without_a_gpu_says_that_it_plans_for_its_cpu(small, monkeypatch, capsys, accelerator, hints):
    """Unless the experiment trains there on purpose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("siglit.commands.plan.estimate_memory", lambda *_, **__: estimate())
    measured = ThroughputMeasurement("a CPU", pairs=4, seconds_per_pair=1.0, optimizer_seconds=1.0)
    monkeypatch.setattr("siglit.commands.plan.measure_throughput", lambda *_, **__: measured)
    siglit.plan(parse("plan", "--train.accelerator", accelerator, config=str(small)))
    assert capsys.readouterr().err.count("--gpu-memory plans for GPUs") == hints


@pytest.mark.parametrize(
    ("steps", "every", "kept"), [(10, 0, 0), (None, 0, 0), (10, 4, 4), (10, 5, 3), (10, 40, 2), (None, 4, None)]
)
def test_the_disk_that_checkpoints_take_is_counted(steps, every, kept):
    """Weights of the start, of every so many steps and of the end; whole also where each device holds a half."""
    for strategy, devices, part in (("ddp", 2, 1), ("fsdp2", 2, 2), ("fsdp2", 1, 1)):
        memory = SimpleNamespace(weights=100 // part, optimizer=200 // part)
        train = TrainConfig(keep_every=every, strategy=strategy)
        fields = _disk_fields(train, memory, devices, steps)
        assert fields["checkpoint_bytes"] == 300
        assert fields["kept_checkpoints"] == kept
        assert fields["kept_bytes"] == (None if kept is None else 100 * kept)


def test_the_disk_that_kept_weights_take_is_shown(small):
    plan = siglit.plan(parse("plan", "--train.keep_every", "4", config=str(small)), examples_per_second=1.0)
    assert plan.kept_bytes == 4 * plan.weight_bytes
    assert "for the weights of 4 steps" in str(plan)
    assert "number not known" in str(replace(plan, kept_checkpoints=None, kept_bytes=None))
    assert "kept checkpoints" not in str(replace(plan, kept_checkpoints=0, kept_bytes=0))
