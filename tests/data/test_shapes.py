"""The generated set: different scenes, complete and different descriptions, the same images for the same seed."""

import itertools

import numpy as np
import pytest

from siglit.data.shapes import (
    COLORS,
    IMAGE_SIZE,
    LAYOUTS,
    SHAPES,
    SIZES,
    SYNONYMS,
    Scene,
    Thing,
    arrange,
    captions,
    draw_image,
    draw_scenes,
    generate,
)


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(1500, seed=0)


def test_scenes_are_different_from_each_other(scenes):
    assert len(scenes) == len(set(scenes)) == 1500


def test_a_longer_list_begins_with_the_shorter(scenes):
    for count in (0, 1, 200):
        assert draw_scenes(count, seed=0) == scenes[:count]
    assert draw_scenes(200, seed=1) != scenes[:200]


def test_every_word_and_layout_is_used(scenes):
    assert {s.layout for s in scenes} == set(LAYOUTS)
    assert {len(s.things) for s in scenes} == {2, 3}
    things = {thing for s in scenes for thing in s.things}
    assert {t.color for t in things} == set(COLORS)
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.size for t in things} == set(SIZES)


def test_five_captions_different_and_shared_by_no_two_scenes(scenes):
    """A caption of two scenes would make a correct answer count as wrong."""
    sets = [captions(scene) for scene in scenes]
    assert {len(texts) for texts in sets} == {5}
    everything = list(itertools.chain(*sets))
    assert len(set(everything)) == len(everything) == 7500


def test_look_alike_scenes_have_no_caption_in_common():
    """The same objects in another order or layout, or one of them twice."""
    a, b = Thing("red", "circle", "small"), Thing("blue", "ring", "large")
    alike = [Scene(layout, things) for layout in LAYOUTS for things in [(a, b), (b, a), (a, a), (a, b, a), (b, a, b)]]
    everything = [text for scene in alike for text in captions(scene)]
    assert len(set(everything)) == len(everything) == 100


def test_every_caption_names_every_object(scenes):
    for scene in scenes[:200]:
        for text in captions(scene):
            for thing in scene.things:
                for word in (thing.color, thing.shape, thing.size):
                    assert word in text or SYNONYMS[word] in text


def test_objects_lie_as_the_layout_says(scenes):
    """In reading order: left to right, top to bottom, and inside the image, apart from each other."""
    signs = {"row": (1, 0), "column": (0, 1), "diagonal": (1, 1), "antidiagonal": (-1, 1)}
    for number, scene in enumerate(scenes[:300]):
        places = arrange(scene, (0, number))
        steps = np.diff(places[:, :2], axis=0)
        for axis, sign in enumerate(signs[scene.layout]):
            if sign:
                assert (steps[:, axis] * sign > 0.1).all()
        assert (places[:, :2] - places[:, 2:] > 0).all()
        assert (places[:, :2] + places[:, 2:] < 1).all()
        large = np.array([thing.size == "large" for thing in scene.things])
        assert (places[large, 2] > 0.1).all()
        assert (places[~large, 2] < 0.1).all()


def test_an_object_is_drawn_in_its_color_at_its_place(scenes):
    for number, scene in enumerate(scenes[:60]):
        pixels = np.asarray(draw_image(scene, (0, number))).astype(int)
        for thing, (x, y, _) in zip(scene.things, arrange(scene, (0, number)), strict=True):
            if thing.shape != "ring":
                middle = pixels[int(y * IMAGE_SIZE), int(x * IMAGE_SIZE)]
                assert np.abs(middle - COLORS[thing.color]).max() <= 14


def test_the_same_seed_gives_the_same_bytes():
    first, second, other = (list(generate(6, seed)) for seed in (3, 3, 4))
    assert [(s, i.tobytes()) for s, i in first] == [(s, i.tobytes()) for s, i in second]
    assert first[0][1].tobytes() != other[0][1].tobytes()
    assert all(i.size == (IMAGE_SIZE, IMAGE_SIZE) and i.mode == "RGB" for _, i in first)


def test_two_images_of_one_scene_differ(scenes):
    assert draw_image(scenes[0], 1).tobytes() != draw_image(scenes[0], 2).tobytes()
