"""The text tower is transformers' SigLIP text model in the sizes of the field, or a pretrained one with a new head."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from transformers import SiglipTextConfig, SiglipTextModel

from siglit.config import TextTowerConfig
from siglit.errors import UserError
from siglit.models.text_tower import TextTower
from tests.models.text_models import KINDS, SPECIAL, VOCABULARY, save_model
from tests.models.text_models import captions as padded_captions

SMALL = TextTowerConfig(size="micro", width=32, depth=2, heads=4)
BUILT_FOR = {"vocab_size": 50, "length": 6, "eos_id": 1, "pad_id": 1, "dim": 20}


def small_tower(config=SMALL, **changes):
    torch.manual_seed(0)
    return TextTower(config, **(BUILT_FOR | changes)).eval()


def captions(count=3):
    return torch.randint(2, 50, (count, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [
        ("micro", 128, 3, 4),
        ("S", 384, 12, 6),
        ("M", 512, 12, 8),
        ("B", 768, 12, 12),
        ("L12", 1024, 12, 16),
        ("L", 1024, 24, 16),
    ],
)
def test_presets_have_the_stated_size(size, width, depth, heads):
    """Read off the built tower: widths of weights, number of layers, heads, an MLP of four times the width."""
    with torch.device("meta"):
        tower = TextTower(TextTowerConfig(size=size), **BUILT_FOR)
    shapes = {name: tuple(p.shape) for name, p in tower.model.named_parameters()}
    layers = [m for m in tower.modules() if type(m).__name__ == "SiglipEncoderLayer"]
    assert len(layers) == depth
    assert layers[0].self_attn.num_heads == heads
    assert layers[0].self_attn.q_proj.weight.shape == (width, width)
    assert layers[0].mlp.fc1.weight.shape == (4 * width, width)
    assert {shape for name, shape in shapes.items() if name.endswith("token_embedding.weight")} == {(50, width)}
    assert {shape for name, shape in shapes.items() if name.endswith("position_embedding.weight")} == {(6, width)}
    assert {shape for name, shape in shapes.items() if name.endswith("head.weight")} == {(20, width)}


def test_overrides_replace_the_preset():
    tower = small_tower(replace(SMALL, mlp_width=48))
    layers = [m for m in tower.modules() if type(m).__name__ == "SiglipEncoderLayer"]
    assert len(layers) == 2
    assert layers[0].mlp.fc1.weight.shape == (48, 32)


@pytest.mark.parametrize("dim", [20, 32, 77])
def test_output_has_the_width_of_the_images(dim):
    assert small_tower(dim=dim)(captions(3)).shape == (3, dim)


def test_equals_transformers_pooler_output():
    tower = small_tower()
    torch.manual_seed(7)
    reference = SiglipTextModel(
        SiglipTextConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=6,
            projection_size=20,
        )
    ).eval()
    assert not torch.allclose(tower(captions()), reference(captions()).pooler_output)
    reference.load_state_dict(tower.model.state_dict())
    torch.testing.assert_close(tower(captions()), reference(captions()).pooler_output)


def test_padding_is_read_to_the_end():
    """Another padding is another text: there is no mask, and the last position is the embedding."""
    ids = captions()
    ids[:, 3:] = 1
    padded_otherwise = ids.clone()
    padded_otherwise[:, -1] = 2
    in_between = ids.clone()
    in_between[:, 4] = 2
    tower = small_tower()
    assert not torch.allclose(tower(ids), tower(padded_otherwise), atol=1e-4)
    assert not torch.allclose(tower(ids), tower(in_between), atol=1e-4)


def test_attention_is_bidirectional():
    tower = small_tower()
    ids = captions()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    first, other = (tower.model(input_ids=i).last_hidden_state[:, 0] for i in (ids, changed))
    assert not torch.allclose(first, other, atol=1e-4)


def test_captions_do_not_influence_each_other():
    tower, ids = small_tower(), captions(5)
    torch.testing.assert_close(tower(ids)[3:4], tower(ids[3:4]))


def test_every_weight_gets_a_gradient():
    tower = small_tower()
    tower(captions(40)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", [replace(SMALL, heads=5), replace(SMALL, width=30), TextTowerConfig(heads=7)])
def test_heads_that_do_not_divide_the_width(config):
    with pytest.raises(UserError, match=r"text_tower\.width \d+ is not divisible by text_tower\.heads \d+"):
        small_tower(config)


BOTTLENECK = replace(SMALL, embedding_width=5)


class TestBottleneck:
    def test_parameters_are_those_of_two_tables(self):
        whole, narrow = small_tower(), small_tower(BOTTLENECK)
        assert count(whole) - count(narrow) == 50 * 32 - (50 * 5 + 5 * 32)
        assert {p.shape for p in narrow.model.embeddings.token_embedding.parameters()} == {(50, 5), (32, 5)}

    def test_the_summary_names_the_saving(self):
        with torch.device("meta"):
            tower = TextTower(TextTowerConfig(size="B", embedding_width=96), **BUILT_FOR | {"vocab_size": 32_000})
        assert tower.summary == "token embedding 32,000 × 96 + 96 × 768 = 3.15 M parameters instead of 24.6 M"
        assert small_tower().summary is None

    def test_equals_a_tower_with_the_product_of_the_tables(self):
        whole, narrow = small_tower(), small_tower(BOTTLENECK)
        weights = narrow.state_dict()
        table, up = (weights.pop(f"model.embeddings.token_embedding.{i}.weight") for i in (0, 1))
        weights["model.embeddings.token_embedding.weight"] = table @ up.T
        whole.load_state_dict(weights)
        torch.testing.assert_close(narrow(captions()), whole(captions()))

    def test_every_weight_gets_a_gradient(self):
        tower = small_tower(BOTTLENECK)
        tower(captions(40)).square().sum().backward()
        assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_starts_at_the_scale_of_the_usual_table(self):
        config = replace(SMALL, width=256)
        whole = small_tower(config, vocab_size=4000).model.embeddings.token_embedding(torch.arange(4000))
        narrow = small_tower(replace(config, embedding_width=24), vocab_size=4000)
        product = narrow.model.embeddings.token_embedding(torch.arange(4000))
        assert whole.std().item() == pytest.approx(256**-0.5, rel=0.02)
        assert product.std().item() == pytest.approx(whole.std().item(), rel=0.1)


def count(tower):
    return sum(p.numel() for p in tower.parameters())


def pretrained_tower(folder, kind="bert", built=None, **config):
    built = built or {"vocab_size": VOCABULARY, "length": 6, "dim": 20, **SPECIAL[kind]}
    torch.manual_seed(0)
    return TextTower(TextTowerConfig(pretrained=str(folder), **config), **built)


def directly(folder, kind, pooling):
    """Token states of transformers' own model, one caption at a time and without padding, pooled by hand."""
    _, _, read = KINDS[kind]
    model = read.from_pretrained(folder).eval()
    pooled = []
    sizes = (3, 5, 6) if kind == "gpt2" else (2, 4, 6)  # there, padding is end-of-sentence, the first of which is text
    for row, size in zip(padded_captions(kind), sizes, strict=True):
        with torch.no_grad():
            states = model(input_ids=row[None, :size]).last_hidden_state[0]
        pooled.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(pooled)


class TestPretrained:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_equals_transformers_without_padding(self, tmp_path, kind, pooling):
        """Padding, masked, does not change the result."""
        folder = save_model(tmp_path / "model", kind)
        tower = pretrained_tower(folder, kind, pooling=pooling).eval()
        expected = tower.head(directly(folder, kind, pooling))
        torch.testing.assert_close(tower(padded_captions(kind)), expected, atol=1e-5, rtol=1e-4)

    def test_captions_of_no_text_and_no_padding_are_finite(self, tmp_path):
        tower = pretrained_tower(save_model(tmp_path / "model"))
        assert tower(torch.zeros(2, 6, dtype=torch.long)).isfinite().all()
        assert tower(torch.full((2, 6), 5)).isfinite().all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("locked", [False, True])
    def test_names_of_pretrained_parameters(self, tmp_path, kind, locked):
        tower = pretrained_tower(save_model(tmp_path / "model", kind), kind, locked=locked)
        names = {name for name, _ in tower.named_parameters()}
        assert tower.pretrained == names - {"head.weight", "head.bias"}
        assert len(names) > 10
        assert {name for name, p in tower.named_parameters() if p.requires_grad} == (
            {"head.weight", "head.bias"} if locked else names
        )
        assert small_tower().pretrained == frozenset()

    def test_locked_learns_the_head_alone_and_has_no_dropout(self, tmp_path):
        tower = pretrained_tower(save_model(tmp_path / "model"), locked=True).train()
        assert tower.training
        once, again = tower(padded_captions()), tower(padded_captions())
        assert torch.equal(once, again)
        states = []
        tower.model.register_forward_hook(lambda *args: states.append(args[-1].last_hidden_state))
        tower(padded_captions()).square().sum().backward()
        assert states[0].grad_fn is None
        assert {name for name, p in tower.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}

    def test_unlocked_learns_with_the_dropout_of_the_model(self, tmp_path):
        tower = pretrained_tower(save_model(tmp_path / "model"))
        assert not torch.equal(tower(padded_captions()), tower(padded_captions()))
        tower.eval()
        assert torch.equal(tower(padded_captions()), tower(padded_captions()))
        tower.train()(padded_captions()).square().sum().backward()
        assert [name for name, p in tower.named_parameters() if p.grad is None] == []

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("locked", [False, True])
    def test_is_rebuilt_from_a_description_without_the_folder(self, tmp_path, kind, locked):
        """The description and the weights as a checkpoint file holds them."""
        tower = pretrained_tower(save_model(tmp_path / "model", kind), kind, locked=locked, pooling="last")
        built = {"vocab_size": VOCABULARY, "length": 6, "dim": 20, **SPECIAL[kind]}
        about = {
            "text_tower": asdict(TextTowerConfig(pretrained=str(tmp_path / "model"), locked=locked, pooling="last")),
            "built_for": built | {"architecture": tower.architecture},
        }
        torch.save({"siglit": json.loads(json.dumps(about)), "weights": tower.state_dict()}, tmp_path / "a.ckpt")
        shutil.rmtree(tmp_path / "model")
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)
        rebuilt = TextTower(TextTowerConfig(**state["siglit"]["text_tower"]), **state["siglit"]["built_for"])
        rebuilt.load_state_dict(state["weights"])
        assert torch.equal(rebuilt.eval()(padded_captions(kind)), tower.eval()(padded_captions(kind)))
        assert rebuilt.pretrained == tower.pretrained
        assert rebuilt.architecture == tower.architecture

    def test_is_loaded_on_the_cpu_whatever_device_is_the_default(self, tmp_path):
        folder = save_model(tmp_path / "model")
        with torch.device("meta"):
            tower = pretrained_tower(folder)
        assert {p.device.type for p in tower.model.parameters()} == {"cpu"}

    def test_summary(self, tmp_path):
        folder = save_model(tmp_path / "model")
        assert pretrained_tower(folder, locked=True).summary == (
            f"text tower {folder}: BertModel, 0.00534 M parameters, locked, mean pooling, new head 16 × 20"
        )

    @pytest.mark.parametrize("name", ["width", "depth", "heads", "mlp_width", "embedding_width"])
    def test_sizes_of_its_own_are_not_overridden(self, name):
        with pytest.raises(UserError, match=rf"text_tower.{name} is 4, but text_tower.pretrained 'x' has its own"):
            pretrained_tower("x", **{name: 4})

    def test_random_weights_are_not_locked(self):
        with pytest.raises(UserError, match="text_tower.locked is set.*set text_tower.pretrained"):
            small_tower(replace(SMALL, locked=True))

    def test_a_model_that_does_not_fit_the_tokenizer(self, tmp_path):
        folder = save_model(tmp_path / "model")
        built = {"vocab_size": VOCABULARY, "length": 6, "dim": 20, **SPECIAL["bert"]}
        with pytest.raises(UserError, match="embeddings for 40"):
            pretrained_tower(folder, built=built | {"vocab_size": 50})
        with pytest.raises(UserError, match="tokenizer.length is 13"):
            pretrained_tower(folder, built=built | {"length": 13})
