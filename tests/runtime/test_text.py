"""Pieces of one-line messages."""

import pytest

from siglit.runtime.text import first_line, plural


@pytest.mark.parametrize(("count", "text"), [(0, "0 shards"), (1, "1 shard"), (12_000, "12,000 shards")])
def test_a_noun_is_singular_for_one(count, text):
    assert plural(count, "shard") == text


@pytest.mark.parametrize(("noun", "text"), [("class", "2 classes"), ("entry", "2 entries"), ("key", "2 keys")])
def test_plurals_are_spelled_as_in_english(noun, text):
    assert plural(2, noun) == text


def test_an_error_is_one_line_even_without_a_message():
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"
    assert len(first_line(ValueError("x" * 1000))) == 200
