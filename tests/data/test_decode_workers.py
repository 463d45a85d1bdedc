"""Batches of pixels keep the source's order, whatever the number of processes, and list what was skipped."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data._utils.pin_memory import pin_memory

from siglit.data.decode_workers import Decoder, PixelBatch, UnitPixels, pixel_batches
from siglit.data.sources.samples import FilePart, Sample, Unit
from siglit.errors import UserError

# Three processes on two cores: slower than two, and as right.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
SIZES = (7, 0, 3, 4)


def png(number):
    """An image whose every pixel is its number."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


def to_pixels(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class Numbered:
    """Units of images numbered from 0; `other` replaces samples by number, `fails` is the unit that raises."""

    name = "numbered"

    def __init__(self, other=None, fails=None, error=UserError):
        self.other, self.fails, self.error = other or {}, fails, error

    def units(self):
        stops = np.cumsum(SIZES).tolist()
        return [
            Unit(10 + n, f"u{n}", stop - size, stop) for n, (size, stop) in enumerate(zip(SIZES, stops, strict=True))
        ]

    def load(self, unit):
        if unit.number == self.fails:
            raise self.error(f"unit {unit.number} is broken")
        return [
            self.other.get(n, Sample(f"k{n}", png(n), (f"caption {n}",), ("en",), label=n))
            for n in range(unit.start, unit.stop)
        ]


def batches(source, workers=0, batch_size=3, max_pixels=1000):
    dataset = UnitPixels(source, source.units(), to_pixels, batch_size, max_pixels)
    return list(pixel_batches(dataset, workers, pin_memory=False))


def assert_pixels_belong_to_samples(result):
    for batch in result:
        assert len(batch.pixels) == len(batch.samples)
        for pixels, sample in zip(batch.pixels, batch.samples, strict=True):
            number = int(sample.key[1:])
            assert pixels.shape == (3, 5, 6)
            assert (pixels[0] == number).all()
            assert (pixels[1] == 255 - number).all()
            assert sample == Sample(f"k{number}", b"", (f"caption {number}",), ("en",), label=number)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_content_are_the_sources(workers):
    """Keys in order, pixels with their sample, batches within one unit, its last one marked."""
    result = batches(Numbered(), workers)
    assert [(b.unit, b.last, [s.key for s in b.samples]) for b in result] == [
        (10, False, ["k0", "k1", "k2"]),
        (10, False, ["k3", "k4", "k5"]),
        (10, True, ["k6"]),
        (11, True, []),
        (12, True, ["k7", "k8", "k9"]),
        (13, False, ["k10", "k11", "k12"]),
        (13, True, ["k13"]),
    ]
    assert_pixels_belong_to_samples(result)
    assert all(b.pixels.dtype == torch.uint8 and not b.skipped for b in result)


def test_a_unit_of_exact_batches_has_no_empty_one():
    assert [(b.unit, len(b.samples)) for b in batches(Numbered(), batch_size=7)] == [(10, 7), (11, 0), (12, 3), (13, 4)]


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_images_are_listed_and_shift_no_other(tmp_path, workers):
    other = {
        1: Sample("cut", png(1)[:45], ("c",)),
        4: Sample("text", b"not an image", ("c",)),
        5: Sample("empty", b"", ("c",)),
        7: Sample("gone", FilePart(str(tmp_path / "gone.png")), ("c",)),
        8: Sample("large", _large(), ("c",)),
        9: Sample("alone", b"x", ("c",)),
    }
    result = batches(Numbered(other), workers)
    skipped = {key: reason for batch in result for key, reason in batch.skipped}
    assert list(skipped) == ["cut", "text", "empty", "gone", "large", "alone"]
    assert "truncated or broken" in skipped["cut"]
    assert skipped["empty"] == "zero bytes"
    assert skipped["gone"] == "cannot be read: No such file or directory"
    assert "40 x 30 pixels" in skipped["large"]
    assert all(skipped.values())
    assert [s.key for b in result for s in b.samples] == [f"k{n}" for n in range(14) if n not in other]
    assert_pixels_belong_to_samples(result)
    # A batch of bad images only is still there, with its unit.
    assert [(b.unit, b.last, len(b.pixels), len(b.skipped)) for b in result if b.unit == 12] == [(12, True, 0, 3)]


def _large():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    return file.getvalue()


def test_a_sample_without_caption_and_label_is_skipped():
    """One of the two is enough."""
    other = {
        0: Sample("nothing", png(0), ()),
        1: Sample("k1", png(1), ("caption 1",)),
        2: Sample("k2", png(2), (), label=0),
    }
    first = batches(Numbered(other))[0]
    assert first.skipped == [("nothing", "no caption")]
    assert [s.key for s in first.samples] == ["k1", "k2"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_user_error_crosses_processes_unchanged(workers):
    """With its message, not wrapped in a worker's traceback, and after all batches before it."""
    dataset = UnitPixels(Numbered(fails=12), Numbered().units(), to_pixels, 3, 1000)
    stream = pixel_batches(dataset, workers, pin_memory=False)
    assert [next(stream).unit for _ in range(4)] == [10, 10, 10, 11]
    with pytest.raises(UserError, match=r"^unit 12 is broken$"):
        next(stream)


def test_other_errors_are_not_hidden():
    with pytest.raises(KeyError):
        batches(Numbered(fails=12, error=KeyError))


def test_pixels_are_pinned_by_the_loader(monkeypatch):
    """A loader pins by the method of that name, and leaves a class without it as it is."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self + 1)
    batch = PixelBatch(3, True, torch.zeros(2), [], [("k", "r")])
    pinned = pin_memory(batch)
    assert pinned.pixels.tolist() == [1, 1]
    assert (pinned.unit, pinned.last, pinned.skipped) == (3, True, [("k", "r")])


SIDE = 64


def gradient(fmt="PNG", width=80, height=60):
    """Red grows to the right, green downwards, so that the pixels show where a crop was."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width) * 3, np.arange(height)[:, None] * 3
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt)
    return Sample("k", file.getvalue(), ("c",))


def squash(image):
    return to_pixels(image.resize((SIDE, SIDE), Image.Resampling.NEAREST))


def boxes(least, count=300, width=80, height=60):
    """(count, 4) left, upper, right and lower edge of what the decoder kept, in pixels."""
    kept = []

    def note(image):
        pixels = np.asarray(image) // 3
        kept.append((pixels[0, 0, 0], pixels[0, 0, 1], pixels[-1, -1, 0] + 1, pixels[-1, -1, 1] + 1))
        return squash(image)

    decoder = Decoder(note, SIDE, 10_000, crop=least)
    sample = gradient(width=width, height=height)
    for seed in range(count):
        decoder(sample, (0, seed))
    return np.array(kept, dtype=float)


def test_a_random_crop_keeps_the_share_and_the_proportions_it_should():
    left, upper, right, lower = boxes(0.3).T
    area, ratio = (right - left) * (lower - upper) / 4800, (right - left) / (lower - upper)
    assert 0.28 < area.min() < 0.35
    assert 0.9 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.38
    assert ((left == 0).mean(), (right == 80).mean()) < (0.3, 0.3)
    assert abs((left - (80 - right)).mean()) < 3, "as often at the left as at the right"
    assert abs((upper - (60 - lower)).mean()) < 3


def test_an_image_that_no_crop_fits_in_is_kept_whole():
    """A crop of nine tenths with sides of at most 4:3 cannot lie in an image of 8:3."""
    assert (boxes(0.9, 20, 80, 30) == (0, 0, 80, 30)).all()


def test_the_seed_decides_on_crop_and_mirroring():
    decoder = Decoder(squash, SIDE, 10_000, crop=0.3, flip=True)
    decoded = [[decoder(gradient(), (seed, 1)) for seed in range(20)] for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*decoded, strict=True))
    assert len({pixels.numpy().tobytes() for pixels in decoded[0]}) == 20


def test_every_other_image_is_mirrored():
    plain = Decoder(squash, SIDE, 10_000)(gradient(), (0,))
    decoded = [Decoder(squash, SIDE, 10_000, flip=True)(gradient(), (seed,)) for seed in range(200)]
    mirrored = sum(torch.equal(pixels, plain.flip(2)) for pixels in decoded)
    assert mirrored + sum(torch.equal(pixels, plain) for pixels in decoded) == 200
    assert 70 < mirrored < 130


@pytest.mark.parametrize(("crop", "side"), [(None, 20), (0.2, 51)])
def test_a_crop_is_drafted_as_much_larger_as_it_may_be_enlarged(monkeypatch, crop, side):
    """A fifth of the area at 3:4 has a side of 0.39 of the image's."""
    requested = []
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, mode, size: requested.append(size))
    Decoder(squash, SIDE, 10_000, draft=20, crop=crop)(gradient("JPEG"), (0,))
    assert requested == [(side, side)]
