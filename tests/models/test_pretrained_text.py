"""Pretrained text models load whole and safely, name what is wrong with a folder, are masked and pooled."""

import json
from logging import Handler, getLogger
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartModel, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from siglit.errors import UserError
from siglit.models.pretrained_text import (
    architecture_of,
    check_text_model,
    load_text_model,
    pool,
    rebuild_text_model,
    text_mask,
)
from tests.models.text_models import KINDS, VOCABULARY, captions, save_model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_folder(tmp_path, kind):
    _, _, read = KINDS[kind]
    model = load_text_model(save_model(tmp_path / "model", kind))
    assert type(model) is read
    saved = load_file(tmp_path / "model" / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_used(tmp_path, kind):
    """DDP waits for the gradient of every parameter: there must be no unused pooler."""
    model = load_text_model(save_model(tmp_path / "model", kind))
    model(input_ids=captions(kind), attention_mask=torch.ones(3, 6)).last_hidden_state.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_variables_in_the_path(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    monkeypatch.setenv("SIGLIT_TEST_MODELS", str(tmp_path))
    assert load_text_model("${SIGLIT_TEST_MODELS}/model")


def test_half_precision_weights_become_float32(tmp_path):
    save_model(tmp_path / "model")
    half = {k: v.half() for k, v in load_file(tmp_path / "model" / "model.safetensors").items()}
    save_file(half, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = load_text_model(str(tmp_path / "model"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in rebuild_text_model(architecture_of(model)).parameters()} == {torch.float32}


def test_weights_in_a_torch_file(tmp_path):
    save_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    loaded = dict(load_text_model(str(tmp_path / "model")).named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_is_refused_and_does_nothing(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load text_tower.pretrained"):
        load_text_model(str(tmp_path / "model"))
    assert not (tmp_path / "sprung").exists()


def test_code_in_the_folder_is_not_run(tmp_path):
    save_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"cannot load text_tower.pretrained"):
        load_text_model(str(tmp_path / "model"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["siglit-tests/absent", "/no/such/folder"])
def test_out_of_reach_names_the_local_way(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"cannot load text_tower.pretrained '{name}'.*give a folder with config.json"):
        load_text_model(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot load text_tower.pretrained .*config.json"):
        load_text_model(str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    """Left alone, transformers would fill them at random."""
    path = Path(save_model(tmp_path / "model")) / "model.safetensors"
    weights = load_file(path)
    gone = ["encoder.layer.1.output.dense.bias", "encoder.layer.1.output.dense.weight"]
    save_file({k: v for k, v in weights.items() if k not in gone}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lack {gone[0]}, {gone[1]} of BertModel"):
        load_text_model(str(tmp_path / "model"))
    first = {k: v for k, v in weights.items() if not k.startswith("encoder.layer.1")}
    save_file(first, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack encoder.* and 13 more of BertModel"):
        load_text_model(str(tmp_path / "model"))


def test_weights_of_another_shape(tmp_path):
    path = Path(save_model(tmp_path / "model")) / "model.safetensors"
    weights = load_file(path) | {"embeddings.LayerNorm.weight": torch.ones(5)}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot load text_tower.pretrained"):
        load_text_model(str(tmp_path / "model"))


def save_other(folder, kind):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {"image_size": 8, "patch_size": 4}
    if kind == "vit":
        model = ViTModel(ViTConfig(**small, **vision))
    elif kind == "clip":
        text = small | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=small | vision, projection_dim=8))
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartModel(BartConfig(vocab_size=VOCABULARY, d_model=16, **layers))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("vit", "ViTModel returns no state per token"), ("clip", "CLIPModel returns no"), ("bart", "has none for 'bart'")],
)
def test_a_model_that_is_no_text_encoder(tmp_path, kind, words):
    folder = save_other(tmp_path / kind, kind)
    with pytest.raises(UserError, match=rf"is not a text encoder: .*{words}"):
        check_text_model(load_text_model(folder), folder, vocab_size=VOCABULARY, length=6)


@pytest.mark.parametrize(("kind", "positions"), [("bert", 12), ("xlm-roberta", 12), ("gpt2", 12)])
def test_length_beyond_the_positions(tmp_path, kind, positions):
    """XLM-R states 14 positions and keeps two of them for itself."""
    model = load_text_model(save_model(tmp_path / "model", kind))
    assert check_text_model(model, "x", vocab_size=VOCABULARY, length=positions) == 16
    with pytest.raises(UserError, match=rf"tokenizer.length is {positions + 1}, .*lower tokenizer.length"):
        check_text_model(model, "x", vocab_size=VOCABULARY, length=positions + 1)


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    model = load_text_model(save_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"tokenizer has 41 ids, but .* embeddings for 40; remove tokenizer.path"):
        check_text_model(model, "x", vocab_size=VOCABULARY + 1, length=6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_in_json_rebuilds_the_model(tmp_path, kind):
    model = load_text_model(save_model(tmp_path / "model", kind))
    architecture = json.loads(json.dumps(architecture_of(model)))
    assert str(tmp_path) not in json.dumps(architecture)
    rebuilt = rebuild_text_model(architecture)
    assert architecture_of(rebuilt) == architecture
    ids = captions(kind)
    assert not torch.allclose(rebuilt.eval()(input_ids=ids)[0], model.eval()(input_ids=ids)[0])
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(input_ids=ids)[0], model(input_ids=ids)[0])


def test_loading_is_quiet_and_restores_the_verbosity_of_transformers(tmp_path, capfd):
    from transformers.utils import logging

    folder, level = save_model(tmp_path / "model"), logging.get_verbosity()
    handler, records = Handler(), []
    handler.emit = records.append
    capfd.readouterr()
    getLogger("transformers").addHandler(handler)
    try:
        load_text_model(folder)  # the saved pooler is left over: transformers would report it
    finally:
        getLogger("transformers").removeHandler(handler)
    assert records == []
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, True)


def test_mask_ends_with_the_text():
    ids = torch.tensor([[5, 6, 3, 0, 0], [5, 6, 7, 8, 3], [0, 0, 0, 0, 0]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert text_mask(ids, eos_id=3, pad_id=0).tolist() == expected


def test_padding_with_end_of_sentence_keeps_the_first():
    ids = torch.tensor([[5, 6, 1, 1, 1], [5, 6, 7, 8, 1], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert text_mask(ids, eos_id=1, pad_id=1).tolist() == expected


def test_poolings_written_out():
    states = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    sizes = [2, 4, 1]
    mean = torch.stack([states[row, :size].mean(0) for row, size in enumerate(sizes)])
    last = torch.stack([states[row, size - 1] for row, size in enumerate(sizes)])
    torch.testing.assert_close(pool(states, mask, "mean"), mean)
    assert torch.equal(pool(states, mask, "last"), last)
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_elsewhere_are_refused(tmp_path, key):
    """Transformers would fetch and run them, with trust_remote_code=False too."""
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: "evil/kernel"}))
    with pytest.raises(UserError, match="evil/kernel, code from elsewhere"):
        load_text_model(str(tmp_path))
    with pytest.raises(UserError, match="evil/kernel, code from elsewhere"):
        rebuild_text_model({**config, key: "evil/kernel"})
