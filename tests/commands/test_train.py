"""Training: two devices train like one, a run can be resumed, and what does not fit is refused before work is lost."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import siglit
from siglit.cache import EmbeddingCache
from siglit.data import shuffle
from siglit.data.epoch_loader import row_hash
from siglit.errors import UserError
from siglit.loss import sigmoid
from siglit.models.image_tower import ImageEncoder
from siglit.models.text_tower import TextTower
from siglit.runs.launch import check_slurm_tasks
from siglit.runs.trained import open_trained
from siglit.runtime.matmul import matmul_precision
from siglit.training import module as training_module
from siglit.training.callbacks import TrainProgress
from siglit.training.module import SigLiT
from tests.conftest import on, parse, run_siglit


def weights(folder):
    """State dict of a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


RESUMED = ("--train.resume", "true", "--train.resume_changed", "true")


def losses(folder):
    """{step: loss} from metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def test_training_lowers_the_loss_and_writes_its_files(cached, project, device):
    result = siglit.train(parse("train", "--train.steps", "60", "--train.val_every", "30", *on(device)))
    folder = project / "runs/small"
    curve = losses(folder)
    assert curve[59] < 0.7 * curve[1]
    assert result.steps == 60
    assert result.examples_seen == 960
    assert {"train/loss", "val/text_to_image/R@1", "val/image_to_text/R@10"} <= set(result.metrics)
    assert json.loads((folder / "summary.json").read_text())["train"]["steps"] == 60
    assert (folder / "tokenizer.model").exists()


def test_the_trained_text_tower_is_what_is_evaluated(trained, project):
    """retrieval.json equals a plain computation from the checkpoint, the cache and a full score matrix."""
    result = siglit.eval_retrieval(trained)
    written = json.loads((project / "runs/small/retrieval.json").read_text())
    assert written["text_to_image/R@1"] == result.metrics["text_to_image/R@1"]
    cache = EmbeddingCache("cache/small/val")
    state = torch.load(project / "runs/small/checkpoints/last.ckpt", weights_only=True)
    tower = TextTower(parse("train").text_tower, **state["siglit"]["built_for"])
    prefix = "text_tower."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)})
    run = open_trained(trained)
    ids = torch.from_numpy(run.tokenizer([cache.caption(i) for i in range(24)])).long()
    with torch.inference_mode():
        ztxt = torch.nn.functional.normalize(tower.eval()(ids), dim=1).numpy()
    zimg = cache.gather(np.arange(12)).astype(np.float32)
    zimg /= np.linalg.norm(zimg, axis=1, keepdims=True)
    scores = ztxt @ zimg.T
    own = scores[np.arange(24), np.arange(24) // 2]
    rank = (scores >= own[:, None]).sum(1) - 1
    for k in (1, 5, 10):
        assert written[f"text_to_image/R@{k}"] == pytest.approx((rank < k).mean())


def test_two_devices_train_like_one(project):
    """Weights and losses after six DDP steps equal those of one process on the same global batches."""
    run_siglit("precompute", "-c", "experiment.yaml", cwd=project, check=0)
    for devices in (1, 2):
        words = ["--train.devices", devices, "--output_dir", f"runs/{devices}", "--tokenizer.path", "t.model"]
        if devices == 1:
            run_siglit("tokenizer", "train", "-c", "experiment.yaml", "--output_dir", "tok", cwd=project, check=0)
            (project / "tok/tokenizer.model").rename(project / "t.model")
        run_siglit("train", "-c", "experiment.yaml", *words, cwd=project, check=0)
    one, two = weights(project / "runs/1"), weights(project / "runs/2")
    for name in one:
        # Attention does not depend on the keys' bias: its gradient is rounding noise, which Adam scales up to steps.
        if name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-3, msg=name)
    assert losses(project / "runs/2") == pytest.approx(losses(project / "runs/1"), rel=1e-4)


def test_only_steps_that_are_logged_are_summed_up(cached, monkeypatch):
    requested = []
    real = training_module.sigmoid_loss
    recorded = lambda *a, **k: (requested.append(k["statistics"] is not None), real(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(training_module, "sigmoid_loss", recorded)
    siglit.train(cached)
    assert requested == [False, True] * 3


def test_matmul_precision_is_that_of_the_towers_alone_and_is_restored(cached, monkeypatch):
    """Forward and backward of the tower, against products of the loss and scores of validation; then the caller's."""
    precisions = {}

    def record(part):
        precisions.setdefault(part, set()).add(torch.get_float32_matmul_precision())

    def recorded(part, real):
        return lambda *a, **k: (record(part), real(*a, **k))[1]

    def forward(self, ids, real=TextTower.forward):
        record("tower")
        z = real(self, ids)
        if z.requires_grad:
            z.register_hook(lambda _: record("backward"))
        return z

    monkeypatch.setattr(TextTower, "forward", forward)
    for module, part in ((sigmoid, "cosines"), (sigmoid, "add_product"), (training_module, "retrieval_metrics")):
        monkeypatch.setattr(module, part, recorded(part, getattr(module, part)))
    with matmul_precision("medium"):
        siglit.train(parse("train", "--train.matmul_precision", "high"))
        assert torch.get_float32_matmul_precision() == "medium"
    highest = {part: {"highest"} for part in ("cosines", "add_product", "retrieval_metrics")}
    assert precisions == {"tower": {"high"}, "backward": {"high"}, **highest}


def test_matmul_precision_is_restored_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), matmul_precision("high"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.cuda
def test_matmul_precision_high_changes_the_towers_products_and_not_the_loss(project, monkeypatch, batch):
    monkeypatch.chdir(project)
    rows, losses = [], []
    for precision in ("highest", "high"):
        torch.manual_seed(0)
        module = SigLiT(parse("train", "--text_tower.width", "256"), 100)
        module.image_tower = ImageEncoder(None, width=16, head=None)
        module.text_tower = TextTower(
            parse("train", "--text_tower.width", "256").text_tower, vocab_size=64, length=8, eos_id=1, pad_id=1, dim=16
        )
        module._trainer = SimpleNamespace(global_step=0, _logger_connector=SimpleNamespace(should_update_logs=False))
        module.cuda()
        on_device = {name: tensor.cuda() for name, tensor in batch.items()}
        with matmul_precision(precision):
            rows.append(module.embed(on_device)[1].detach())
            monkeypatch.setattr(module, "embed", lambda _: (rows[0], rows[0].flip(0)))
            losses.append(module.training_step(on_device, 0).detach())
    assert not torch.equal(*rows)
    assert torch.equal(*losses)


def gradients(experiment, batch, device="cpu"):
    """{name: gradient} of one step of the module in float64 on a device, without a trainer's optimizer."""
    torch.manual_seed(0)
    module = SigLiT(experiment, 100)
    module.image_tower = ImageEncoder(None, width=16, head=None)
    module.text_tower = TextTower(experiment.text_tower, vocab_size=64, length=8, eos_id=1, pad_id=1, dim=16)
    module.double().to(device)
    module._trainer = SimpleNamespace(global_step=0, _logger_connector=SimpleNamespace(should_update_logs=False))
    module.training_step({name: rows.to(device) for name, rows in batch.items()}, 0).backward()
    return {name: p.grad if p.grad is None else p.grad.cpu() for name, p in module.named_parameters()}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 60, (12, 8))
    ids[5] = ids[2]
    return {
        "image": torch.from_numpy(rng.standard_normal((12, 16)).astype(np.float16)),
        "ids": torch.from_numpy(ids),
        "rows": torch.arange(12),
        "text_ids": torch.from_numpy(row_hash(ids)),
        "image_ids": torch.arange(12),
    }


@pytest.mark.parametrize("size", [1, 5, 12, 100])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_micro_batches_have_the_gradients_of_the_whole_batch(project, monkeypatch, batch, size, loss, device):
    monkeypatch.chdir(project)
    words = ["--loss.name", loss]
    whole = gradients(parse("train", *words), batch)
    passes = []
    real = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda self, ids: (passes.append(len(ids)), real(self, ids))[1])
    parts = gradients(parse("train", *words, "--train.micro_batch_size", str(size)), batch, device)
    assert max(passes) == min(size, 12)
    last = 12 % size or min(size, 12)
    assert sum(passes) == 12 + (12 - last), "all but the last one are computed again"
    assert (parts["logit_bias"] is None) == (loss == "softmax")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-12, msg=name)


def test_without_a_bias_nothing_is_added_and_nothing_is_learned(project, monkeypatch, batch):
    monkeypatch.chdir(project)
    zero = gradients(parse("train", "--loss.logit_bias", "0"), batch)
    none = gradients(parse("train", "--loss.logit_bias", "null"), batch)
    assert none.pop("logit_bias") is None
    assert zero.pop("logit_bias") is not None
    for name in zero:
        torch.testing.assert_close(none[name], zero[name], rtol=0, atol=0, msg=name)


def test_a_shared_caption_is_a_negative_unless_it_is_to_be_left_out(project, monkeypatch, batch, device):
    """Rows 2 and 5 have the same text; `drop` removes just their two pairs from the gradient of the bias."""
    monkeypatch.chdir(project)
    grads = {}
    for treatment in ("negative", "drop", "positive"):
        of_step = gradients(parse("train", "--loss.ambiguous", treatment), batch, device)
        grads[treatment] = of_step["logit_bias"] * 12
    removed = grads["negative"] - grads["drop"]
    assert 0 < removed < 2
    torch.testing.assert_close(grads["positive"], grads["negative"] - 2)


def test_gradients_of_several_batches_are_not_added_up(cached, monkeypatch):
    monkeypatch.setattr(SigLiT, "trainer", SimpleNamespace(accumulate_grad_batches=2), raising=False)
    with pytest.raises(UserError, match="train.micro_batch_size"):
        SigLiT(cached, 1).on_fit_start()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--loss.name", "softmax"],
        ["--loss.ambiguous", "drop", "--loss.negatives", "hardest", "--loss.negatives_per_positive", "3"],
        ["--loss.exchange", "reduce", "--loss.chunk_size", "3", "--train.micro_batch_size", "3"],
    ],
)
def test_other_losses_train_on_two_devices_as_on_one(cached, project, words):
    siglit.train(parse("train", "--output_dir", "runs/1", *words))
    words = [*words, "--output_dir", "runs/2", "--tokenizer.path", "runs/1/tokenizer.model", "--train.devices", "2"]
    run_siglit("train", "-c", "experiment.yaml", *words, cwd=project, check=0)
    assert losses(project / "runs/2") == pytest.approx(losses(project / "runs/1"), rel=1e-3)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--loss.negatives", "random"], "loss.negatives_per_positive null"),
        (["--loss.negatives_per_positive", "3"], "loss.negatives is all"),
        (["--loss.name", "softmax", "--loss.ambiguous", "drop"], "softmax"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(project, monkeypatch, words, text):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=text):
        parse("train", *words)


def test_a_resumed_run_equals_an_undisturbed_one(cached, project, monkeypatch, device):
    """Stopped after a checkpoint inside a pass, continued: the same weights, the same rows of metrics.csv.

    Bit for bit on the CPU. On CUDA, attention and embeddings add up in any order: a few of float32's last digits.
    """
    siglit.train(parse("train", "--output_dir", "runs/whole", *on(device)))

    real = TrainProgress.on_train_batch_end

    def stop_at_4(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == 5:
            raise RuntimeError("the power went")

    monkeypatch.setattr(TrainProgress, "on_train_batch_end", stop_at_4)
    with pytest.raises(RuntimeError, match="power"):
        siglit.train(parse("train", "--output_dir", "runs/broken", *on(device)))
    monkeypatch.undo()
    monkeypatch.chdir(project)
    siglit.train(parse("train", "--output_dir", "runs/broken", *on(device), *RESUMED))
    whole, broken = weights(project / "runs/whole"), weights(project / "runs/broken")
    exact = {"atol": 0, "rtol": 0} if device == "cpu" else {"atol": 1e-4, "rtol": 1e-3}
    for name in whole:
        if device == "cpu" or not name.endswith("k_proj.bias"):  # rounding noise, which Adam scales up to steps
            torch.testing.assert_close(whole[name], broken[name], **exact, msg=name)
    assert losses(project / "runs/broken") == pytest.approx(losses(project / "runs/whole"), rel=exact["rtol"], abs=0)


def test_the_shuffle_is_chosen_once_logged_once_and_kept(cached, project, monkeypatch, capsys):
    """Too little memory: blocks. More of it when the run is resumed: still blocks."""
    monkeypatch.setattr(shuffle, "free_memory", lambda: 7000)
    siglit.train(parse("train", "--train.steps", "3", "--train.val_every", "1"))
    messages = [line for line in capsys.readouterr().err.splitlines() if "shuffling" in line]
    assert messages == ["shuffling blocks (train.shuffle auto; 0.00 GB of embeddings, 0.0 GB of memory free)"]
    monkeypatch.undo()
    monkeypatch.chdir(project)
    siglit.train(parse("train", "--train.steps", "6", "--train.val_every", "1", *RESUMED))
    assert "shuffling blocks (train.shuffle auto; as before the run was resumed)" in capsys.readouterr().err
    with pytest.raises(UserError, match="train.shuffle blocks, but it is rows now"):
        siglit.train(parse("train", "--train.val_every", "1", *RESUMED, "--train.shuffle", "rows"))


def test_an_earlier_run_is_not_overwritten(trained):
    with pytest.raises(UserError, match="--train.resume true"):
        siglit.train(trained)


def test_a_run_is_not_resumed_as_another(trained):
    with pytest.raises(UserError, match="cannot resume.*text_tower"):
        siglit.train(parse("train", *RESUMED, "--text_tower.depth", "2"))
    with pytest.raises(UserError, match="cannot resume.*batch_size"):
        siglit.train(parse("train", *RESUMED, "--train.batch_size", "8"))


@pytest.mark.parametrize(
    "changed", [("--optim.lr", "0.3"), ("--optim.weight_decay", "0.3"), ("--optim.betas", "[0.1, 0.2]")]
)
def test_a_resumed_run_uses_the_new_hyperparameters(cached, project, changed):
    """Needed after a loss that is not finite: the weights then move otherwise than with the checkpoint's values."""
    usual = ["--optim.schedule", "constant", "--train.val_every", "3"]
    for folder, words in (("same", []), ("other", changed)):
        siglit.train(parse("train", *usual, "--output_dir", folder, "--train.steps", "3"))
        siglit.train(parse("train", *usual, *words, "--output_dir", folder, *RESUMED))
    same, other = weights(project / "same"), weights(project / "other")
    assert max((other[name] - same[name]).abs().max() for name in same) > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.name", "lion"], "optimizer adamw, but the experiment has lion"),
        (["--optim.name", "adafactor"], "optimizer adamw, but the experiment has adafactor"),
        (["--loss.name", "softmax"], "optim.image_lr_multiplier"),
        (["--text_tower.width", "16"], "text_tower.width 32, but the experiment has 16"),
        (["--tokenizer.length", "9"], "built_for.length 8, but the experiment has 9"),
    ],
)
def test_a_checkpoint_of_another_optimizer_or_model_is_refused(trained, words, message):
    with pytest.raises(UserError, match=f"cannot resume.*{message}") as error:
        siglit.train(parse("train", *RESUMED, "--train.steps", "8", *words))
    assert len(str(error.value)) < 300


def test_training_without_a_cache_says_how_to_make_it(experiment):
    with pytest.raises(UserError, match="siglit precompute"):
        siglit.train(experiment)


def test_training_on_another_towers_cache_names_the_field(cached):
    with pytest.raises(UserError, match=r"image_tower.pooling is 'tower', expected 'avg'"):
        siglit.train(parse("train", "--image_tower.pooling", "avg"))


def test_training_on_other_weights_is_noticed(cached, project, tower_weights):
    """The weights file is compared by content where it exists, and not needed where it does not."""
    other = project / "other.safetensors"
    other.write_bytes(tower_weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="weights_file"):
        siglit.train(parse("train", "--image_tower.weights", str(other)))
    siglit.train(parse("train", "--image_tower.weights", str(project / "not-on-this-machine.safetensors")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.batch_size", "64"], "train.batch_size 64 is larger than the 40 images of data.train"),
        (["--train.epochs", "2"], "one of train.steps, train.examples and train.epochs"),
        (["--text_tower.heads", "5"], "heads"),
        (["--tokenizer.path", "missing.model"], "missing.model"),
        (["--tokenizer.vocab_size", "100"], "tokenizer"),
        (["--train.loggers", "[wandb]"], r"pip install 'siglit\[wandb\]'"),
    ],
)
def test_settings_that_cannot_work_are_refused(cached, words, message):
    with pytest.raises(UserError, match=message):
        siglit.train(parse("train", *words))


def test_the_tokenizer_of_other_settings_is_refused(trained):
    with pytest.raises(UserError, match="vocab_size 320"):
        siglit.train(parse("train", *RESUMED, "--tokenizer.vocab_size", "330"))


def test_evaluation_refuses_what_does_not_belong_together(cached, project):
    with pytest.raises(UserError, match="siglit train"):
        siglit.eval_retrieval(cached)
    siglit.train(cached)
    with pytest.raises(UserError, match="another tokenizer"):
        siglit.eval_retrieval(parse("eval-retrieval", "--tokenizer.length", "9"))
    siglit.precompute(
        parse("precompute", "--cache.path", "avg", "--image_tower.image_size", "32", "--image_tower.std", "[1,1,1]")
    )
    with pytest.raises(UserError, match="trained on embeddings of"):
        siglit.eval_retrieval(parse("eval-retrieval", "--cache.path", "avg", "--image_tower.std", "[1,1,1]"))


def test_a_checkpoint_is_never_unpickled(cached, project):
    """A file with code in it is refused, and the code does not run."""

    class Code:
        def __reduce__(self):
            return (open, (str(project / "ran"), "w"))

    torch.save({"siglit": Code()}, project / "evil.ckpt")
    with pytest.raises(UserError, match="evil.ckpt is not a checkpoint"):
        siglit.eval_retrieval(parse("eval-retrieval", "--eval.checkpoint", "evil.ckpt"))
    assert not (project / "ran").exists()


def test_search_finds_what_was_trained(cached, project):
    experiment = parse("train", "--train.steps", "60", "--train.val_every", "0")
    siglit.train(experiment)
    result = siglit.search(experiment, "a red square")
    assert len(result.keys) == 10
    assert result.scores == sorted(result.scores, reverse=True)
    best = [int(key[-8:-4]) % 4 for key in result.keys[:3]]
    assert best == [0, 0, 0], "red pictures come first"
    assert len(list((project / "runs/small").glob("images-val-*.faiss"))) == 1
    with pytest.raises(UserError, match="empty"):
        siglit.search(experiment, "  ")


def test_languages_are_distinguished(tmp_path, monkeypatch, tower_weights, project):
    """An XM3600 set gives a table by language with the average."""
    monkeypatch.chdir(project)
    names = ("red", "green", "blue", "grey")
    german = dict(zip(names, ("rot", "grün", "blau", "grau"), strict=True))
    with (project / "captions.jsonl").open("w") as file:
        for n in range(40):
            color = names[n % 4]
            record = {"image/key": f"{n:04d}", "image/locale": "en", "en": {"caption": [f"{color} {n}"]}}
            if n < 30:
                record["de"] = {"caption": [f"{german[color]} {n}"]}
            file.write(json.dumps(record) + "\n")
    words = ["--data.train.format", "xm3600", "--data.train.path", "captions.jsonl", "--eval.split", "train"]
    experiment = parse("train", *words, "--data.val", "null")
    siglit.precompute(experiment)
    siglit.train(experiment)
    result = siglit.eval_retrieval(experiment)
    assert list(result.by_language) == ["de", "en", "average"]
    for name in ("image_to_text/R@1", "text_to_image/R@10"):
        mean = (result.by_language["de"][name] + result.by_language["en"][name]) / 2
        assert result.by_language["average"][name] == pytest.approx(mean)
    assert "average" in str(result)


def test_a_locked_run_is_not_resumed_on_another_cache(cached, project):
    """Of the same tower and as many images: only the digest tells them apart. A cache that was moved is the same."""
    siglit.train(parse("train", "--train.steps", "2"))
    images = project / "images"
    for path in images.iterdir():
        path.write_bytes((images / f"{(int(path.stem) + 1) % 40:04d}.png").read_bytes())
    siglit.precompute(parse("precompute", "--cache.path", "cache/other"))
    words = ["--train.steps", "4", *RESUMED]
    with pytest.raises(UserError, match=r"cache/small/train \(digest .*, but cache/other/train \(digest") as error:
        siglit.train(parse("train", *words, "--cache.path", "cache/other"))
    assert "\n" not in str(error.value)
    (project / "cache/small").rename(project / "cache/moved")
    assert siglit.train(parse("train", *words, "--cache.path", "cache/moved")).steps == 4


def test_a_checkpoint_that_does_not_record_its_cache_is_resumed(cached, project, capsys):
    siglit.train(parse("train", "--train.steps", "2"))
    path = project / "runs/small/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (loader,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader.pop("cache.path") == "cache/small/train"
    assert len(loader.pop("cache.digest")) == 32
    torch.save(checkpoint, path)
    assert siglit.train(parse("train", "--train.steps", "4", *RESUMED)).steps == 4
    message = "the checkpoint does not record the cache it was trained on; assuming that it is cache/small/train\n"
    assert message in capsys.readouterr().err


def test_the_last_line_of_progress_shows_the_last_validation(cached, project, capsys, monkeypatch):
    """Also where the last step has had a line before its validation."""
    monkeypatch.setattr("siglit.runtime.progress._SECONDS_BETWEEN_LINES", 0.0)
    result = siglit.train(cached)
    shown = f"val/text_to_image/R@1 {result.metrics['val/text_to_image/R@1']:.3g}"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    steps = {int(line.split("step ")[1].split()[0]): line for line in lines}
    assert "val/" not in steps[2]
    assert "val/text_to_image/R@1" in steps[3], "the line of a step comes again with its validation"
    assert shown in lines[-1]
    assert shown in steps[6]


SLURM = {"SLURM_JOB_NAME": "job", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("tasks", "words", "message"),
    [
        (
            {"NTASKS": "2"},
            ["--train.devices", "2"],
            "SLURM has started the job with --ntasks 2, but train.devices is 2",
        ),
        ({"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}, [], "--ntasks-per-node 2 --nodes 1, but train.devi"),
        ({"NTASKS": "1", "NNODES": "1"}, ["--train.devices", "2"], "--ntasks 1 --nodes 1, but train.devices is 2"),
        ({"NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}, [], "--nodes 2, but train.devices is 1 and train.no"),
    ],
)
def test_tasks_of_slurm_that_do_not_fit_the_devices_are_refused(experiment, monkeypatch, tasks, words, message):
    """Before anything is read: there is no cache yet."""
    for name, value in {**SLURM, **{f"SLURM_{k}": v for k, v in tasks.items()}}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        siglit.train(parse("train", *words))
    assert re.search(r"start the job with --nodes \d --ntasks-per-node \d", str(error.value))
    assert "\n" not in str(error.value)


def test_one_task_of_slurm_for_one_device_trains(cached, monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}.items():
        monkeypatch.setenv(name, value)
    assert siglit.train(cached).steps == 6


def test_a_batch_larger_than_the_data_is_refused_before_the_schedule(cached):
    """It comes to no step of an epoch, into which no warm-up fits."""
    words = ["--train.steps", "null", "--train.epochs", "3", "--train.batch_size", "64"]
    for stage in (siglit.train, siglit.dry_run):
        with pytest.raises(UserError, match="train.batch_size 64 is larger than the 40 images"):
            stage(parse("train", *words))


def test_torchrun_within_a_slurm_job_trains(cached, monkeypatch):
    """One task of SLURM for each machine, whose torchrun starts a rank for each device."""
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**SLURM, **torchrun, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    check_slurm_tasks("train", 4, 2)
