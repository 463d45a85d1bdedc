"""The text tower is transformers' SigLIP text model in the sizes of the field."""

from dataclasses import replace

import pytest
import torch
from transformers import SiglipTextConfig, SiglipTextModel

from siglit.config import TextTowerConfig
from siglit.errors import UserError
from siglit.models.text_tower import TextTower

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


def test_attention_looks_both_ways():
    tower = small_tower()
    ids = captions()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    first, other = (tower.model(input_ids=i).last_hidden_state[:, 0] for i in (ids, changed))
    assert not torch.allclose(first, other, atol=1e-4)


def test_captions_do_not_influence_each_other():
    tower, ids = small_tower(), captions(5)
    torch.testing.assert_close(tower(ids)[3:4], tower(ids[3:4]))


def test_every_weight_learns():
    tower = small_tower()
    tower(captions(40)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", [replace(SMALL, heads=5), replace(SMALL, width=30), TextTowerConfig(heads=7)])
def test_heads_that_do_not_divide_the_width(config):
    with pytest.raises(UserError, match=r"width \d+ cannot have \d+ heads"):
        small_tower(config)
