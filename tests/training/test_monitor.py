"""The monitor: norms are correct, unlogged steps cost nothing, and a run that diverges stops and says where."""

import copy
import csv
import itertools
import math
import os

import h5py
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import siglit
from siglit.cache import EmbeddingCache
from siglit.cli import main
from siglit.commands.train import TrainProgress
from siglit.data.cache_loader import CacheLoader
from siglit.runs.launch import quiet_lightning
from siglit.training import monitor
from siglit.training.monitor import StepTimer, TrainingMonitor
from tests.conftest import parse, run_siglit

BATCH, STEPS = 5, 7


class Tiny(pl.LightningModule):
    """Two towers, one of them frozen, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.step_timer = StepTimer()
        self.text_tower = nn.Linear(4, 3, bias=False)
        self.image_tower = nn.Linear(4, 3, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed(self, batch):
        return self.image_tower(batch["image"]), self.text_tower(batch["ids"])

    def training_step(self, batch, _=0):
        zimg, ztxt = self.embed(batch)
        with self.step_timer("loss"):
            loss = (self.scale * zimg * ztxt).square().sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Batches(list):
    """Batches with keys for their rows, as the loaders have."""

    def keys(self, rows):
        return [f"picture {row}" for row in rows]


class Data(pl.LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return self.batches

    def shuffle_message(self):
        return ""


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return Batches(
        {"image": torch.randn(BATCH, 4), "ids": torch.randn(BATCH, 4), "rows": torch.arange(BATCH) + BATCH * step}
        for step in range(STEPS)
    )


def fit(module, batches, folder, log_every, *others, device="cpu"):
    """Train without a checkpoint."""
    quiet_lightning()
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_steps=len(batches),
        gradient_clip_val=0.5,
        log_every_n_steps=log_every,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[TrainingMonitor(BATCH, folder / "checkpoints"), *others],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=Data(batches))


def rows_of(folder):
    """The logged steps in metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "train/grad_norm" in row]


def test_the_norms_are_those_of_a_loop_written_out(batches, tmp_path, device):
    """Gradients before clipping, weights after the step, and their difference; the frozen tower is none."""
    module = Tiny()
    other = copy.deepcopy(module)
    other.log = lambda *_: None
    fit(module, batches, tmp_path, 1, device=device)
    rows = rows_of(tmp_path)
    assert len(rows) == STEPS
    optimizer = other.configure_optimizers()
    for row, batch in zip(rows, batches, strict=True):
        before = other.text_tower.weight.detach().clone()
        scale_before = other.scale.item()
        optimizer.zero_grad()
        other.training_step(batch).backward()
        tower, scale = other.text_tower.weight.grad.norm().item(), other.scale.grad.item()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        assert row["train/text_tower/grad_norm"] == pytest.approx(tower, rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx((tower**2 + scale**2) ** 0.5, rel=1e-5)
        after = other.text_tower.weight.detach()
        assert row["train/text_tower/param_norm"] == pytest.approx(after.norm().item(), rel=1e-5)
        update = (after - before).norm().item()
        assert row["train/text_tower/update_norm"] == pytest.approx(update, rel=1e-4)
        whole = math.hypot(update, other.scale.item() - scale_before)
        assert row["train/update_norm"] == pytest.approx(whole, rel=1e-4)
        assert not any(name.startswith("train/image_tower") for name in row)


def test_shares_of_the_time_add_up_to_one(batches, tmp_path, device):
    fit(Tiny(), batches, tmp_path, 2, device=device)
    for row in rows_of(tmp_path):
        shares = {name: value for name, value in row.items() if name.startswith("time/")}
        assert set(shares) == {"time/data", "time/towers", "time/loss", "time/optimizer"}
        assert all(0 < share < 1 for share in shares.values())
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["train/examples_per_second"] > 0


def test_a_part_within_another_is_counted_once(monkeypatch):
    """Readings 0, 1, 3, 6, 10: the loss takes 3 to 6, 1 to 3 and 6 to 10 are the towers', 0 to 1 is the data's."""
    readings = iter([0, 1, 3, 6, 10])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(readings))
    timer = StepTimer()
    with timer("loss"):
        assert timer.seconds == {}, "no part is timed yet"
    timer.switch_to("data")
    timer.switch_to("towers")
    with timer("loss"):
        pass
    timer.switch_to(None)
    assert timer.seconds == {"data": 1, "towers": 6, "loss": 3}
    assert timer.shares() == {"data": 0.1, "towers": 0.6, "loss": 0.3}
    assert timer.seconds == {}


def test_a_step_that_is_not_logged_copies_nothing_times_nothing_and_reads_nothing(batches, tmp_path, monkeypatch):
    """Of seven steps, the third and the sixth are logged; the last is followed by the check at the end."""
    module = Tiny()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # AdamW reads its step counter
    copies, times, reads = [], [], []

    def recorded(owner, name, where, counts=lambda tensor: True):
        real = getattr(owner, name)

        def record(self, *rest, **options):
            if counts(self):
                where.append(module._now)
            return real(self, *rest, **options)

        monkeypatch.setattr(owner, name, record)

    recorded(torch.Tensor, "clone", copies, lambda tensor: tensor.numel() > 1)
    recorded(StepTimer, "switch_to", times)
    for name in ("item", "tolist", "__float__", "__bool__"):
        recorded(torch.Tensor, name, reads)

    class Step(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            module._now = trainer.global_step + 1

        def on_train_end(self, *_):
            module._now = None

    module._now = None
    fit(module, batches, tmp_path, 3, TrainProgress(BATCH, STEPS), Step())
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 5]
    assert copies == [3, 6]
    assert set(reads) - {None} == {3, 6, 7}, "the seventh step ends the run"
    assert set(times) == {2, 3, 5, 6}, "a batch is waited for in the name of the step before"


def test_losses_do_not_pile_up_where_little_is_logged(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "_MAX_UNCHECKED_STEPS", 2)
    held = []
    real = TrainingMonitor.check
    monkeypatch.setattr(
        TrainingMonitor, "check", lambda self, trainer: (held.append(len(self._unchecked)), real(self, trainer))
    )
    fit(Tiny(), batches, tmp_path, 100)
    assert held == [2, 2, 2, 1]


def test_a_loss_that_is_not_finite_is_traced_to_its_step_and_batch(batches, tmp_path):
    """Found only at the end, four steps later, when all losses since are not finite either.

    The message names the checkpoint to resume from, not the newer one whose weights alone were kept.
    """
    batches[2]["ids"][1, 1] = torch.nan
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(("step-00000002.ckpt", "last.ckpt", "previous.ckpt")):
        (tmp_path / "checkpoints" / name).touch()
        os.utime(tmp_path / "checkpoints" / name, (1000 - age, 1000 - age))
    message = (
        r"^the loss is nan at step 3, in the batch of picture 10, picture 11, picture 12 and 2 more; .*last\.ckpt$"
    )
    with pytest.raises(RuntimeError, match=message):
        fit(Tiny(), batches, tmp_path, 100)


def test_weights_that_are_not_finite_after_the_last_step_are_noticed(batches, tmp_path):
    """Its loss was still finite, and there is no later one."""
    module = Tiny()
    module.text_tower.weight.register_hook(lambda grad: grad * torch.nan if module.global_step == STEPS - 1 else grad)
    with pytest.raises(
        RuntimeError, match=f"the weights are no longer finite after step {STEPS}; .* no checkpoint yet"
    ):
        fit(module, batches, tmp_path, 100)


def test_mfu_is_counted_without_side_effects(batches, tmp_path, monkeypatch):
    """A 4 × 3 layer: 24 operations forward, 24 for its weights; 24 forward of the frozen one."""
    module = Tiny()
    module.text_tower = nn.Sequential(nn.Dropout(0.5), module.text_tower)
    state = torch.get_rng_state()
    assert monitor.flops_per_pair(module, batches[0]) == 72
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    fit(Tiny(), batches, tmp_path / "unknown", 2)
    assert "train/mfu" not in rows_of(tmp_path / "unknown")[0]
    monkeypatch.setattr(monitor, "peak_flops", lambda device: 1e9)
    fit(module, batches, tmp_path / "known", 2)
    for row in rows_of(tmp_path / "known"):
        assert row["train/mfu"] == pytest.approx(row["train/examples_per_second"] * 72 / 1e9, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_only_a_known_device_has_a_peak(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert monitor.peak_flops(torch.device("cuda", 0)) == peak
    assert monitor.peak_flops(torch.device("cpu")) is None


@pytest.fixture
def poisoned(project, monkeypatch):
    """The project with a cache in which one row of the second batch is NaN."""
    monkeypatch.chdir(project)
    siglit.precompute(parse("precompute"))
    cache = EmbeddingCache("cache/small/train")
    ids = np.zeros((cache.caption_offsets[-1], 8))
    _, second = itertools.islice(CacheLoader(cache, ids, batch_size=16, seed=0), 2)
    shard, row = divmod(int(second["rows"][0]), 8)
    with h5py.File(sorted((project / "cache/small/train").glob("*.h5"))[shard], "r+") as file:
        file["embedding"][row] = np.nan
    return project


def error_line(stderr):
    lines = [line for line in stderr.splitlines() if line.startswith("siglit:")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_a_bad_cache_ends_the_command_with_one_line_and_no_bad_checkpoint(poisoned, capsys):
    """Nothing is logged before the checkpoint after the third step, which is not written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml", "--train.log_every", "50"])
    assert stop.value.code == 3
    line = error_line(capsys.readouterr().err)
    assert "the loss is nan at step 2, in the batch of" in line
    assert "13 more" in line
    assert not list((poisoned / "runs/small").rglob("*.ckpt"))


@pytest.mark.slow
def test_two_devices_have_the_metrics_of_one_and_stop_together(poisoned):
    words = ["--train.log_every", "1", "--data.val", "null"]
    with pytest.raises(RuntimeError, match="the loss is nan at step 2, .* and 13 more; "):
        siglit.train(parse("train", *words, "--output_dir", "runs/1"))
    words += ["--tokenizer.path", "runs/1/tokenizer.model", "--train.devices", "2", "--output_dir", "runs/2"]
    line = error_line(run_siglit("train", "-c", "experiment.yaml", *words, cwd=poisoned, check=3).stderr)
    assert "the loss is nan at step 2, in the batch of" in line
    assert "13 more" in line, "of both devices"
    (one,), (two,) = rows_of(poisoned / "runs/1"), rows_of(poisoned / "runs/2")
    norms = [name for name in one if name.endswith("_norm")]
    assert len(norms) == 5
    assert "train/update_norm" in norms
    assert {name: two[name] for name in norms} == pytest.approx({name: one[name] for name in norms}, rel=1e-3)
