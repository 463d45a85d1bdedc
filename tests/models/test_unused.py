"""Parameters that a pooling never uses are frozen: both towers train on two ranks, and nothing else is frozen."""

import signal
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AlbertConfig,
    DistilBertConfig,
    IBertConfig,
    LongformerConfig,
    MPNetConfig,
    SqueezeBertConfig,
    SqueezeBertModel,
)

import siglit
from siglit.config import (
    DataConfig,
    Experiment,
    ImageTowerConfig,
    OptimConfig,
    SourceSpec,
    TextTowerConfig,
    TokenizerConfig,
    TrainConfig,
)
from siglit.models import image_tower, text_tower
from siglit.models.image_tower import ImageTower
from siglit.models.pretrained_text import _class_of
from siglit.models.text_tower import TextTower
from siglit.models.unused import freeze_unused, graph_only
from siglit.planning.memory import RandomDataModule
from siglit.runs.launch import quiet_lightning
from siglit.training.fsdp import shard
from siglit.training.module import SigLiT
from siglit.training.optim import build_optimizer
from tests.conftest import parse, run_siglit
from tests.models.text_models import KINDS, SIZES, VOCABULARY, captions

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SIGLIP = "vit_base_patch16_siglip_224"


class Loss(nn.Module):
    """The module's loss as its forward, as Lightning hands it to DDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module._loss(*self.module.embed(batch), batch, None)


def two_steps(rank, size, experiment):
    """Train for two steps on random pairs, as quietly as the command; return what learns, and what did not change."""
    with warnings.catch_warnings():
        quiet_lightning()
        return _two_steps(rank, size, experiment)


def _two_steps(rank, size, experiment):
    torch.manual_seed(0)
    data, module = RandomDataModule(experiment), SigLiT(experiment, 2)
    module.build(data)
    if experiment.train.strategy == "fsdp2":
        shard(module, init_device_mesh("cpu", (size,)))
        model = Loss(module)
    else:
        model = DistributedDataParallel(Loss(module), gradient_as_bucket_view=True)
    optimizer = build_optimizer(module, experiment.optim, module.multipliers())
    with torch.no_grad():
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(data.batch(2)).backward()
        optimizer.step()
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    return learning, {name for name, p in module.named_parameters() if torch.equal(p, before[name])}


def experiment_of(folder, image, text=None, **train):
    return Experiment(
        data=DataConfig(train=SourceSpec(format="csv", path="none.csv")),
        mode="scratch",
        output_dir=str(folder / "run"),
        image_tower=image,
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, length=6),
        text_tower=text or TextTowerConfig(width=16, depth=1, heads=2),
        optim=OptimConfig(name="adamw", weight_decay=0.1),
        train=TrainConfig(batch_size=4, devices=2, accelerator="cpu", **train),
    )


def vit(pooling, model=SIGLIP, **more):
    return ImageTowerConfig(model=model, pretrained=False, model_args=TINY | more, pooling=pooling)


LEFT = {
    (SIGLIP, "tower"): set(),
    (SIGLIP, "map"): set(),
    (SIGLIP, "avg"): {"attn_pool"},
    ("vit_pe_core_tiny_patch16_384", "cls+avg"): {"attn_pool"},  # a class token and a MAP head
    ("vit_relpos_base_patch16_224", "avg"): {"fc_norm"},
    ("vit_tiny_patch16_224", "cls"): set(),
    ("vit_tiny_patch16_224", "cls+avg"): set(),
}
"""What each pooling leaves of a tower, by child."""


@pytest.mark.parametrize(("model", "pooling"), LEFT)
def test_what_the_pooling_leaves_is_frozen_and_nothing_else(model, pooling):
    """It equals what a real training step leaves without a gradient; the parameters and their names stay."""
    tower = ImageTower(vit(pooling, model), trainable=True)
    parameters = dict(tower.named_parameters())
    expected = {n for n in parameters if n.split(".")[1] in LEFT[model, pooling]}
    assert {*tower.unused} == expected == {n for n, p in parameters.items() if not p.requires_grad}
    assert len(tower.unused) == len(expected)
    tower.requires_grad_(True)(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    assert {n for n, p in parameters.items() if p.grad is None} == expected
    assert tower.training
    assert ImageTower(vit(pooling, model)).unused == []
    with torch.device("meta"):
        assert {*ImageTower(vit(pooling, model), trainable=True).unused} == expected


def test_layers_that_are_skipped_at_random_count_as_used():
    tower = ImageTower(vit("avg", drop_path_rate=0.9, patch_drop_rate=0.5), trainable=True)
    assert {n.split(".")[1] for n in tower.unused} == {"attn_pool"}


def test_a_forward_keeps_nothing_for_backward():
    """The search costs one forward, whatever the size of the tower."""
    weight = nn.Parameter(torch.ones(1_000_000))
    with graph_only():
        output = (weight.exp() * weight).sum()
    with pytest.raises(AssertionError, match="no backward"):
        output.backward()
    assert freeze_unused(nn.ParameterList([weight, torch.ones(2)]), output) == ["1"]


class Hidden(torch.autograd.Function):
    """Makes its gradients in a backward of its own."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            ctx.module(torch.ones(1, 2)).backward(gradient)
        return gradient, None


def test_what_the_graph_may_hide_is_not_frozen():
    """Reversible layers, such as Reformer's, get gradients that no graph shows."""
    hidden = nn.Linear(2, 2)
    output = Hidden.apply(torch.ones(1, 2, requires_grad=True), hidden).sum()
    assert freeze_unused(hidden, output) == []
    assert hidden.weight.requires_grad


def test_towers_train_on_two_ranks_whatever_the_pooling(ranks, tmp_path):
    """The second step of DDP fails where a parameter of the first had no gradient."""
    for (model, pooling), left in LEFT.items():
        (learning, same), _ = ranks.run(two_steps, 2, experiment_of(tmp_path, vit(pooling, model)))
        assert {name.split(".")[3] for name in same} == left
        assert not learning & same


def test_a_convolutional_tower_trains_on_two_ranks_without_a_warning(ranks, tmp_path):
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    image = ImageTowerConfig(model="convnext_atto", pretrained=False, model_args=sizes, image_size=32)
    (learning, same), _ = ranks.run(two_steps, 2, experiment_of(tmp_path, image))
    assert learning
    assert not same


def test_unused_weights_are_sharded_and_stay(ranks, tmp_path):
    experiment = experiment_of(tmp_path, vit("avg"), strategy="fsdp2")
    (learning, same), _ = ranks.run(two_steps, 2, experiment)
    assert {name.split(".")[3] for name in same} == {"attn_pool"}
    assert not learning & same


CONFIGS = {
    "albert": AlbertConfig(**SIZES, embedding_size=8, max_position_embeddings=12),
    "distilbert": DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "ibert": IBertConfig(**SIZES, max_position_embeddings=14, pad_token_id=0),
    "longformer": LongformerConfig(**SIZES, max_position_embeddings=14, attention_window=4, pad_token_id=0),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=14),
    "squeezebert": SqueezeBertConfig(**SIZES, embedding_size=16, max_position_embeddings=12),
}
GLOBAL = {
    f"model.encoder.layer.{i}.attention.self.{n}_global.{k}"
    for i in (0, 1)
    for n in ("query", "key", "value")
    for k in ("weight", "bias")
}
TEXT = {"squeezebert": {"model.pooler.dense.weight", "model.pooler.dense.bias"}, "longformer": GLOBAL}
"""Unused parts of a model: a pooler that cannot be left out, attention to tokens that no mask selects."""


@pytest.mark.parametrize("kind", [*KINDS, *CONFIGS])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_unused_parameters_of_a_text_model_are_frozen(monkeypatch, kind, pooling):
    torch.manual_seed(0)
    config = CONFIGS.get(kind) or KINDS[kind][1]
    model_class, options = _class_of(config, kind)
    monkeypatch.setattr(text_tower, "load_text_model", lambda _: model_class(config, **options))
    built = {"vocab_size": VOCABULARY, "length": 6, "eos_id": 3, "pad_id": 0, "dim": 8}
    tower = TextTower(TextTowerConfig(pretrained="model", pooling=pooling), **built)
    expected = TEXT.get(kind, set())
    assert {*tower.unused} == expected == {n for n, p in tower.named_parameters() if not p.requires_grad}
    assert expected <= tower.pretrained
    ids = captions("bert")
    tower.requires_grad_(True)(ids).sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is None} == expected
    locked = TextTower(TextTowerConfig(pretrained="model", pooling=pooling, locked=True), **built)
    assert locked.unused == []


def test_a_text_model_with_an_unused_pooler_trains_on_two_ranks(ranks, tmp_path):
    SqueezeBertModel(CONFIGS["squeezebert"]).save_pretrained(tmp_path / "model")
    text = TextTowerConfig(pretrained=str(tmp_path / "model"))
    (learning, same), _ = ranks.run(two_steps, 2, experiment_of(tmp_path, vit("avg"), text))
    assert {f"text_tower.{name}" for name in TEXT["squeezebert"]} == {n for n in same if n.startswith("text_tower")}
    assert not learning & same


def test_towers_with_random_weights_use_all_parameters():
    built = {"vocab_size": 20, "length": 6, "eos_id": 1, "pad_id": 1, "dim": 8}
    for config in (TextTowerConfig(width=16, depth=1, heads=2), TextTowerConfig(size="micro", embedding_width=8)):
        tower = TextTower(config, **built)
        tower(torch.randint(0, 20, (2, 6))).sum().backward()
        assert [n for n, p in tower.named_parameters() if p.grad is None] == tower.unused == []


AVG = ["--mode", "scratch", "--image_tower.model", SIGLIP, "--image_tower.pooling", "avg", "--train.val_every", "3"]


def test_a_run_of_an_earlier_commit_resumes(experiment, project, monkeypatch):
    """Its optimizer listed unused weights; it resumes like one that did not, bit for bit."""
    siglit.train(parse("train", *AVG))
    with monkeypatch.context() as patch:
        patch.setattr(image_tower, "freeze_unused", lambda *_: [])
        more = ["--tokenizer.path", "runs/small/tokenizer.model", "--output_dir", "runs/earlier"]
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            siglit.train(parse("train", *AVG, *more))
    path = project / "runs/earlier/checkpoints/last.ckpt"
    earlier = torch.load(path, weights_only=True)
    assert earlier["global_step"] == 4
    assert any("attn_pool" in name for names in earlier["siglit"]["learning"] for name in names)
    assert siglit.train(parse("train", *AVG, *more, "--train.resume", "true")).steps == 6
    resumed, plain = (
        torch.load(project / f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("earlier", "small")
    )
    assert resumed["state_dict"].keys() == plain["state_dict"].keys() == earlier["state_dict"].keys()
    assert all(torch.equal(resumed["state_dict"][n], value) for n, value in plain["state_dict"].items())
    assert resumed["siglit"]["learning"] == plain["siglit"]["learning"]
    assert resumed["optimizer_states"][0]["state"].keys() == plain["optimizer_states"][0]["state"].keys()
    assert siglit.eval_retrieval(parse("eval-retrieval", *AVG, *more)).images == 12


def stop_at(patch, step):
    real = SigLiT.training_step

    def stopping(self, batch, number):
        if self.trainer.global_step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, number)

    patch.setattr(SigLiT, "training_step", stopping)


@pytest.mark.slow
def test_two_devices_train_a_map_tower_without_its_head(experiment, project):
    run_siglit(
        "train", "-c", "experiment.yaml", *AVG, "--train.devices", "2", "--train.steps", "2", cwd=project, check=0
    )


def test_a_dry_run_lists_what_is_never_read(experiment):
    text = str(siglit.dry_run(parse("train", *AVG)))
    assert "never read, so left unchanged: 13 tensors of 28,224 parameters" in text
    assert "\nimage_tower.tower.backbone.attn_pool.latent\n" in text
    assert "never read" not in str(siglit.dry_run(parse("train", *AVG, "--image_tower.pooling", "map")))
