"""Pieces of one-line messages."""

import json

import pytest

from siglit.runtime.text import first_line, json_problem, plural


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


def test_a_missing_key_is_named_in_words():
    assert first_line(KeyError("shards")) == "no 'shards'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it is empty"),
        ('{"a":', "expecting value at column 6"),
        ('{\n"a" 1}', "expecting ':' delimiter at line 2, column 5"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "a number has too many digits"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_a_problem_of_json_in_words(text, expected):
    with pytest.raises((ValueError, RecursionError)) as error:
        json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    assert json_problem(error.value) == expected
