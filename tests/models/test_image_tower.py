"""The image tower is the timm model it claims to be, or says why not; and it is frozen."""

import gc
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor

from siglit.config import ImageTowerConfig
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
VIT = ImageTowerConfig(model="vit_tiny_patch16_224.augreg_in21k", pretrained=False, model_args=SMALL)
SIGLIP = replace(VIT, model="vit_base_patch16_siglip_224.webli")
REGISTERS_ONLY = replace(VIT, model="vit_base_patch16_reg4_gap_256.untrained")
CLASS_AND_REGISTERS = replace(VIT, model="vit_small_patch14_reg4_dinov2.lvd142m")


def source_model(config=VIT, seed=0, **arguments):
    """A timm model with random weights and a head of ten classes, whose norms and biases are not the initial ones."""
    torch.manual_seed(seed)
    model = timm.create_model(config.model, num_classes=10, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count=3, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalized(tower, pixels):
    return (pixels / 255 - tower.mean / 255) / (tower.std / 255)


def pooled(model, tower, pixels):
    """The features the source model hands to its own classifier."""
    with torch.inference_mode():
        return model.forward_head(model.forward_features(normalized(tower, pixels)), pre_logits=True)


def refused(config, *texts):
    with pytest.raises(UserError) as caught:
        ImageTower(config)
    for text in texts:
        assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class TestWeights:
    def check(self, model, config):
        tower, pixels = ImageTower(config), images()
        torch.testing.assert_close(tower(pixels), pooled(model, tower, pixels), rtol=1e-5, atol=1e-5)
        other = ImageTower(VIT)
        assert not torch.allclose(other(pixels), pooled(model, tower, pixels), atol=0.1)

    def test_safetensors_embed_like_their_model(self, tmp_path):
        """The classifier in the file is left out."""
        model = source_model()
        safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
        self.check(model, replace(VIT, weights=str(tmp_path / "w.safetensors")))

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
    def test_pth_embeds_like_its_model(self, tmp_path, monkeypatch, wrap):
        """Bare, or within a training checkpoint; the path may hold a variable."""
        model = source_model()
        torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
        monkeypatch.setenv("SIGLIT_TEST_WEIGHTS", str(tmp_path))
        self.check(model, replace(VIT, weights="${SIGLIT_TEST_WEIGHTS}/w.pth"))

    def test_augreg_npz_embeds_like_its_model(self, tmp_path):
        model = source_model()
        np.savez(tmp_path / "w.npz", **augreg(model))
        self.check(model, replace(VIT, weights=str(tmp_path / "w.npz")))

    @pytest.mark.parametrize("safe", [True, False])
    def test_local_folder_embeds_like_its_model(self, tmp_path, monkeypatch, safe):
        """Architecture, its arguments, size and normalization come from the folder's config.json."""
        model = source_model()
        save_for_hf(model, tmp_path, safe_serialization=safe, data_config={"mean": [0.1, 0.2, 0.3]})
        monkeypatch.setenv("SIGLIT_TEST_WEIGHTS", str(tmp_path))
        for folder in (tmp_path, "$SIGLIT_TEST_WEIGHTS"):
            config = ImageTowerConfig(model=f"local-dir:{folder}")
            assert ImageTower(config).image_size == 32
            assert ImageTower(config).mean.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
            self.check(model, config)

    def test_weights_of_another_resolution_are_resampled(self, tmp_path):
        """As timm does for position embeddings: a size set by img_size is not an error."""
        model = source_model(img_size=64)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        tower = ImageTower(replace(VIT, weights=str(tmp_path / "w.pth")))
        assert tower(images()).isfinite().all()

    @pytest.mark.parametrize("place", ["file", "folder"])
    def test_keys_that_do_not_fit_are_named(self, tmp_path, place):
        """Missing, foreign and of another shape; nothing is left at random values in silence."""
        model = source_model()
        state = model.state_dict()
        whole = dict(state)
        del state["blocks.1.attn.proj.weight"]
        state["blocks.7.attn.proj.weight"] = torch.zeros(3)
        state["norm.bias"] = torch.zeros(49)
        if place == "file":
            path = tmp_path / "w.safetensors"
            config = replace(VIT, weights=str(path))
        else:
            save_for_hf(model, tmp_path, safe_serialization=True)
            path = tmp_path / "model.safetensors"
            config = ImageTowerConfig(model=f"local-dir:{tmp_path}")
        safetensors.torch.save_file(state, path)
        refused(
            config,
            "1 missing: blocks.1.attn.proj.weight",
            "1 not of this model: blocks.7.attn.proj.weight",
            "1 of another shape: norm.bias (49,), expected (48,)",
        )
        safetensors.torch.save_file(whole, path)
        ImageTower(config)

    def test_weights_of_another_architecture(self, tmp_path):
        torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
        refused(replace(VIT, weights=str(tmp_path / "w.pth")), "do not fit", "missing: cls_token", "conv1.weight")

    @pytest.mark.parametrize("depth", [1, 3])
    def test_npz_of_another_depth(self, tmp_path, depth):
        """Also of a deeper tower, whose first blocks timm would take for the whole."""
        np.savez(tmp_path / "w.npz", **augreg(source_model(depth=depth)))
        refused(replace(VIT, weights=str(tmp_path / "w.npz")), f"{depth} blocks, expected 2")

    # timm leaves the archive open when reading it fails; collected here, it does not trouble another test.
    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_npz_of_another_width(self, tmp_path):
        np.savez(tmp_path / "w.npz", **augreg(source_model(embed_dim=96)))
        refused(replace(VIT, weights=str(tmp_path / "w.npz")), "cannot read the weights")
        gc.collect()

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.npz", "w"])
    def test_files_that_are_no_weights(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no weights at all")
        refused(replace(VIT, weights=str(tmp_path / name)), "cannot read the weights", name)

    @pytest.mark.parametrize("content", [torch.zeros(3), {"model": 3}, {"a": 1}, [1, 2]])
    def test_tensors_without_a_model(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        refused(replace(VIT, weights=str(tmp_path / "w.pth")), "w.pth")

    def test_missing_file(self, tmp_path):
        refused(replace(VIT, weights=str(tmp_path / "w.pth")), "cannot be read", "w.pth")
        refused(replace(VIT, weights=str(tmp_path)), "cannot be read")


class Evil:
    """Unpickling it makes a file: a stand-in for any code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestCodeInWeights:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".npz"])
    @pytest.mark.parametrize("dump", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
    def test_is_refused_and_not_run(self, tmp_path, suffix, dump):
        path = tmp_path / f"w{suffix}"
        dump({"cls_token": Evil(tmp_path / "harm")}, path)
        refused(replace(VIT, weights=str(path)), "cannot read the weights")
        assert not (tmp_path / "harm").exists()

    def test_is_refused_and_not_run_in_a_folder(self, tmp_path):
        save_for_hf(source_model(), tmp_path, safe_serialization=True)
        (tmp_path / "model.safetensors").unlink()
        torch.save({"cls_token": Evil(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
        refused(ImageTowerConfig(model=f"local-dir:{tmp_path}"), "cannot read the weights")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_is_refused_and_not_run_in_object_arrays(self, tmp_path):
        arrays = augreg(source_model()) | {"cls": np.array([Evil(tmp_path / "harm")], dtype=object)}
        np.savez(tmp_path / "w.npz", **arrays)
        refused(replace(VIT, weights=str(tmp_path / "w.npz")), "cannot read the weights")
        gc.collect()
        assert not (tmp_path / "harm").exists()

    def test_would_run_if_unpickled(self, tmp_path):
        """A control: the file the tests above use does harm where weights are unpickled."""
        torch.save({"cls_token": Evil(tmp_path / "harm")}, tmp_path / "w.pth")
        torch.load(tmp_path / "w.pth", weights_only=False)["cls_token"].close()
        assert (tmp_path / "harm").exists()


class TestPooling:
    @pytest.mark.parametrize(
        ("config", "pooling", "by_hand"),
        [
            (VIT, "tower", lambda model, tokens: tokens[:, 0]),
            (VIT, "cls", lambda model, tokens: tokens[:, 0]),
            (VIT, "avg", lambda model, tokens: tokens[:, 1:].mean(1)),
            (VIT, "cls+avg", lambda model, tokens: torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)),
            (SIGLIP, "tower", lambda model, tokens: model.attn_pool(tokens)),
            (SIGLIP, "map", lambda model, tokens: model.attn_pool(tokens)),
            (SIGLIP, "avg", lambda model, tokens: tokens.mean(1)),
            (CLASS_AND_REGISTERS, "cls", lambda model, tokens: tokens[:, 0]),
            (CLASS_AND_REGISTERS, "avg", lambda model, tokens: tokens[:, 5:].mean(1)),
            (REGISTERS_ONLY, "avg", lambda model, tokens: tokens[:, 4:].mean(1)),
        ],
    )
    def test_is_its_definition(self, tmp_path, config, pooling, by_hand):
        model, pixels = source_model(config), images()
        torch.save(model.state_dict(), tmp_path / "w.pth")
        tower = ImageTower(replace(config, pooling=pooling, weights=str(tmp_path / "w.pth")))
        with torch.inference_mode():
            tokens = model.forward_features(normalized(tower, pixels))
            expected = by_hand(model, tokens)
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)
        assert tower.embedding_width == expected.shape[1] == (96 if pooling == "cls+avg" else 48)

    def test_map_is_the_towers_own_where_its_head_leaves_prefix_tokens_out(self):
        arguments = {**SMALL, "class_token": True, "pool_include_prefix": False}
        config = replace(SIGLIP, model_args=arguments)
        torch.manual_seed(0)
        tower = ImageTower(replace(config, pooling="map"))
        own = ImageTower(config)
        own.backbone.load_state_dict(tower.backbone.state_dict())
        assert torch.equal(tower(images()), own(images()))

    @pytest.mark.parametrize(
        ("model", "pooling", "text"),
        [
            ("resnet18", "cls", "no tokens to pool"),
            ("resnet18", "avg", "no tokens to pool"),
            (SIGLIP.model, "cls", "no class token"),
            (SIGLIP.model, "cls+avg", "no class token"),
            (REGISTERS_ONLY.model, "cls", "no class token"),
            (REGISTERS_ONLY.model, "cls+avg", "no class token"),
            (VIT.model, "map", "no MAP head"),
        ],
    )
    def test_a_pooling_the_tower_lacks(self, model, pooling, text):
        """A register is no class token, though it stands in its place."""
        arguments = {} if model == "resnet18" else SMALL
        refused(replace(VIT, model=model, model_args=arguments, pooling=pooling), model, text, "image_tower.pooling")

    def test_a_tower_that_returns_a_map(self):
        refused(replace(VIT, model="resnet18", model_args={"global_pool": ""}), "one row per image")


class TestConfig:
    def test_unknown_name_lists_its_neighbors(self):
        refused(
            replace(VIT, model="vit_tiny_patch17_224"),
            "no image_tower.model 'vit_tiny_patch17_224'",
            "vit_tiny_patch16_224",
        )
        refused(replace(VIT, model="nonsense"), "no image_tower.model 'nonsense'")

    def test_unknown_tag(self):
        refused(replace(VIT, model="vit_tiny_patch16_224.nope"), "nope")

    @pytest.mark.parametrize("arguments", [{"nonsense": 1}, {"num_classes": 3}])
    def test_unknown_model_args_are_named(self, arguments):
        refused(replace(VIT, model_args={**SMALL, **arguments}), "image_tower.model_args", *arguments)

    def test_hub_out_of_reach_names_the_local_ways(self, offline):
        for model in ("hf-hub:siglit-tests/absent", "vit_giant_patch14_clip_224.laion2b"):
            refused(
                ImageTowerConfig(model=model, model_args={} if "hub" in model else SMALL),
                f"cannot load {model}",
                "image_tower.weights",
                "local-dir:",
            )

    def test_missing_folder(self, tmp_path):
        refused(ImageTowerConfig(model=f"local-dir:{tmp_path}/no"), f"{tmp_path}/no", "config.json")

    def test_a_size_the_tower_does_not_take(self):
        refused(replace(VIT, image_size=40), "40 pixels", "image_tower.image_size", "img_size")

    def test_normalization_needs_three_channels(self):
        refused(replace(VIT, mean=[0.5, 0.5]), "image_tower.mean", "3 channels")


def noise_image(width=77, height=50):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestPixels:
    @pytest.mark.parametrize("filter_", ["bilinear", "bicubic", "lanczos", "nearest"])
    @pytest.mark.parametrize("size", [(77, 50), (50, 77), (9, 200), (32, 32)])
    def test_squash_is_pils_resize_to_the_towers_size(self, filter_, size):
        tower, image = ImageTower(replace(VIT, interpolation=filter_)), noise_image(*size)
        pixels = tower.transform()(image)
        expected = np.asarray(image.resize((32, 32), getattr(Image.Resampling, filter_.upper())))
        assert pixels.dtype == torch.uint8
        assert np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - expected).max() <= 1

    def test_crop_keeps_proportions(self):
        """Resize of the short side to size / crop_pct, then the center."""
        tower, image = ImageTower(replace(VIT, resize="crop")), noise_image(80, 40)
        assert tower.crop_pct == 0.9
        short = int(32 / 0.9)
        resized = image.resize((2 * short, short), Image.Resampling.BICUBIC)
        left, top = round((2 * short - 32) / 2), round((short - 32) / 2)
        expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
        assert np.abs(tower.transform()(image).numpy().transpose(1, 2, 0).astype(int) - expected).max() <= 1

    def test_image_size_other_than_the_towers(self):
        tower = ImageTower(replace(VIT, model_args={**SMALL, "dynamic_img_size": True}, image_size=48))
        assert tower.transform()(noise_image()).shape == (3, 48, 48)
        assert tower(images(side=48)).shape == (3, 48)

    @pytest.mark.parametrize(("mean", "std"), [(None, None), ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])])
    def test_uint8_normalization_is_torchvisions(self, mean, std):
        tower = ImageTower(replace(VIT, mean=mean, std=std))
        tower.backbone = nn.Identity()
        image = noise_image(32, 32)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        expected = Compose([ToTensor(), Normalize(mean or [0.5] * 3, std or [0.5] * 3)])(image)
        torch.testing.assert_close(tower(pixels)[0], expected, rtol=0, atol=1e-6)


class TestFingerprint:
    def test_is_json_and_the_same_for_the_same_tower(self, tmp_path):
        torch.save(source_model().state_dict(), tmp_path / "a.pth")
        safetensors.torch.save_file(source_model().state_dict(), tmp_path / "b.safetensors")
        first, second = (
            ImageTower(replace(VIT, weights=str(tmp_path / name))).fingerprint() for name in ("a.pth", "b.safetensors")
        )
        assert first == second == json.loads(json.dumps(first))

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"pooling": "avg"}, "pooling"),
            ({"pooling": "cls+avg"}, "width"),
            ({"interpolation": "bilinear"}, "transform"),
            ({"resize": "crop"}, "transform"),
            ({"jpeg_draft": True}, "transform"),
            ({"mean": [0.4, 0.5, 0.5]}, "transform"),
            ({"std": [0.4, 0.5, 0.5]}, "transform"),
            ({"model_args": {**SMALL, "qk_norm": True}}, "model_args"),
            ({"model": "vit_small_patch16_224.augreg_in21k"}, "model"),
        ],
    )
    def test_changes_with_what_decides_a_row(self, change, field):
        torch.manual_seed(0)
        before = ImageTower(VIT).fingerprint()
        torch.manual_seed(0)
        assert ImageTower(replace(VIT, **change)).fingerprint()[field] != before[field]

    def test_a_draft_keeps_what_the_transform_shrinks_the_short_side_to(self):
        assert ImageTower(VIT).draft() is None
        assert ImageTower(replace(VIT, jpeg_draft=True)).draft() == 32
        cropped = ImageTower(replace(VIT, jpeg_draft=True, resize="crop"))
        assert cropped.draft() == cropped.transform().transforms[0].size == 35

    def test_changes_with_one_bit_of_one_weight(self):
        tower = ImageTower(VIT)
        before = tower.fingerprint()
        bias = tower.backbone.blocks[1].mlp.fc2.bias
        bias[3] = torch.nextafter(bias[3], torch.tensor(1.0))
        after = tower.fingerprint()
        assert after["weights"] != before["weights"]
        assert {**after, "weights": None} == {**before, "weights": None}


class TestLayout:
    """Convolution towers run on channels-last pixels; others as they did."""

    def seen(self, tower):
        """The memory formats in which the convolutions get their inputs, and the embeddings."""
        formats = []

        def look(_, inputs):
            # Of one channel or one pixel an input has both formats.
            if min(inputs[0].shape[1:3]) > 1:
                last = inputs[0].is_contiguous(memory_format=torch.channels_last)
                formats.append(torch.channels_last if last else torch.contiguous_format)

        for module in tower.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(look)
        return formats, tower(images(side=tower.image_size))

    @pytest.mark.parametrize("model", ["test_efficientnet", "test_resnet", "test_convnext"])
    def test_convolutions_run_channels_last_and_embed_the_same(self, model):
        tower = ImageTower(ImageTowerConfig(model=model, pretrained=False, image_size=64))
        formats, rows = self.seen(tower)
        assert len(formats) > 2
        assert set(formats) == {torch.channels_last}
        tower._memory_format = torch.contiguous_format
        before, contiguous = self.seen(tower)
        assert torch.contiguous_format in before
        torch.testing.assert_close(rows, contiguous, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("trainable", [False, True])
    def test_weights_keep_their_layout(self, trainable):
        """FSDP2 refuses any other, and the fingerprint and checkpoints are of these."""
        tower = ImageTower(ImageTowerConfig(model="test_resnet", pretrained=False), trainable=trainable)
        assert all(parameter.is_contiguous() for parameter in tower.parameters())

    def test_a_vit_is_unaffected(self):
        formats, _ = self.seen(ImageTower(VIT))
        assert formats == [torch.contiguous_format]


class TestFrozen:
    def test_no_parameter_requires_a_gradient(self):
        tower = ImageTower(SIGLIP)
        assert not any(p.requires_grad for p in tower.parameters())
        assert not tower(images()).requires_grad

    def test_dropout_is_off(self):
        tower = ImageTower(replace(VIT, model_args={**SMALL, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}))
        assert not any(module.training for module in tower.modules())
        assert torch.equal(tower(images()), tower(images()))


def augreg(model):
    """The model's weights in the layout of big_vision's AugReg releases; the inverse of timm's reader."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    width = model.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(len(model.blocks)):
        here, there = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        attention = there + "MultiHeadDotProductAttention_1/"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{there}{theirs}/scale"] = state[f"{here}{ours}.weight"]
            arrays[f"{there}{theirs}/bias"] = state[f"{here}{ours}.bias"]
        kernels, biases = (np.split(state[f"{here}attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{here}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{here}attn.proj.bias"]
        for layer in (0, 1):
            dense = f"{there}MlpBlock_3/Dense_{layer}/"
            arrays[dense + "kernel"] = state[f"{here}mlp.fc{layer + 1}.weight"].T
            arrays[dense + "bias"] = state[f"{here}mlp.fc{layer + 1}.bias"]
    return arrays


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "x.pth"},
        {"pretrained_cfg": {"file": "x.pth"}},
        {"pretrained_cfg_overlay": {"file": "x.pth", "custom_load": True}},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1/x.pth"}},
        {"pretrained_custom_load": True},
        {"cache_dir": "elsewhere"},
        {"pretrained": True},
    ],
)
def test_model_args_name_no_weights(arguments, monkeypatch, tmp_path):
    """No file is opened, let alone unpickled: only fields of the fingerprint say where weights come from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("built"))
    name = next(iter(arguments))
    with pytest.raises(UserError, match=rf"^image_tower.model_args.{name} says where .*; use image_tower.weights"):
        ImageTower(replace(VIT, pretrained=True, model_args={**SMALL, **arguments}))
