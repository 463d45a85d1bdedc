"""A value that no field can have is refused in one line that names the field, before anything is written.

The cases are generated from the dataclasses of the experiment, so a field that is added later is among them.
`test_broken_files.py` breaks the files that siglit reads.
"""

import dataclasses
import math
from typing import Literal, get_args, get_origin

import pytest
import yaml

from siglit.cli import main
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.parsing import arguments
from siglit.parsing.fields import FIELDS, describe_type, is_free_form
from tests.conftest import parse


@pytest.fixture(scope="module")
def one_parser():
    """One parser for each command: building it takes longer than all else that is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        parsers, build = {}, arguments._parser
        patch.setattr(
            arguments,
            "_parser",
            lambda prog, command: parsers.get(prog) or parsers.setdefault(prog, build(prog, command)),
        )
        yield


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with an experiment and nothing else that it names; the test works there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text(
        "data: {train: {format: csv, path: train.csv}, val: {format: csv, path: val.csv}}\ntrain: {steps: 6}\n"
    )
    return tmp_path


def tree(folder):
    """{name: kind, modification time and bytes} of everything in a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.is_file() and path.lstat().st_mtime_ns,
            content(path),
        )
        for path in sorted(folder.rglob("*"))
    }


def content(path):
    return path.read_bytes() if path.is_file() else b""


def refused(capsys, folder, *words):
    """Run a command in this process, in the current folder; return the line in which it refuses what it was given.

    Exit code 2, one printable line, no traceback and no advice to read one, nothing in the folder written or changed.
    """
    before = tree(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert stop.value.code == 2, err
    assert len(lines) == 1, err
    assert out == ""
    line = lines[0]
    assert line.startswith("siglit: ")
    assert line.isprintable(), line
    assert len(line) < 600, line
    for junk in ("Traceback", "--debug", "Error(", "<class ", "object at 0x", "NoneType", "Errno", ".. "):
        assert junk not in line, line
    assert tree(folder) == before, line
    return line.removeprefix("siglit: ")


def with_value(experiment, name, value):
    """The experiment with one field replaced, as a program would that calls siglit."""
    section, _, rest = name.partition(".")
    inner = with_value(getattr(experiment, section), rest, value) if rest else value
    return dataclasses.replace(experiment, **{section: inner})


def impossible(kind):
    """Values of the right type that no field of this type can have."""
    members = get_args(kind) or (kind,)
    inner = {arg for member in members for arg in get_args(member)} | {*get_args(kind)}
    if get_origin(kind) is Literal or bool in members:
        return []
    if get_origin(kind) in (list, tuple, dict) or any(get_origin(member) in (list, tuple) for member in members):
        number = math.nan if float in inner else -1
        if get_origin(kind) is dict:
            return [{"a": math.nan}, {"a": math.inf}] if float in inner else []
        return [[number] * 2, [number] * 3, [math.inf] * 3] if {int, float} & inner else []
    values = []
    if int in members:
        values += [-1, 2**63, 10**25]
    if float in members:
        values += [math.nan, math.inf, -math.inf]
    if str in members:
        values += ["", "\0", "a\0b", "\udcff", "\ud83d"]
    return values


GENERATED = [(name, value) for name, kind in FIELDS.items() for value in impossible(kind)]


def test_many_values_are_generated():
    assert len(GENERATED) > 200
    assert len({name for name, _ in GENERATED}) > 70


def test_a_value_that_no_field_can_have_is_refused_by_name(base):
    """Every field that holds a number or a string: 300 cases."""
    experiment = parse("train")
    accepted = []
    for name, value in GENERATED:
        try:
            with_value(experiment, name, value)
        except UserError as error:
            text = str(error)
            assert text.startswith(f"{name} is "), text
            assert "\n" not in text
            assert len(text) < 450, text
        else:
            accepted.append((name, value))
    assert accepted == []


BLANK = [name for name, kind in FIELDS.items() if "a string" in describe_type(kind) and name.count("separator") == 0]


def test_a_blank_string_is_refused(base):
    experiment = parse("train")
    for name in BLANK:
        with pytest.raises(UserError, match=f"^{name} is '  ', but it must "):
            with_value(experiment, name, "  ")


# What is written where, in YAML, and what the line must say.
FIELD_LINES = [
    ("seed", str(2**32), "seed is 4294967296, but it must be from 0 to 4,294,967,295"),
    ("text_tower.width", "1" + "0" * 25, "but it must be 1 or more, at most 2,147,483,647"),
    ("text_tower.depth", "5000", "text_tower.depth is 5000, but it must be from 1 to 1,024"),
    ("data.workers", "100000", "data.workers is 100000, but it must be from 0 to 1,024"),
    ("cache.devices", "2000", "cache.devices is 2000, but it must be from 1 to 1,024"),
    ("tokenizer.length", "100000", "tokenizer.length is 100000, but it must be from 2, a piece of text and the end"),
    ("tokenizer.character_coverage", "0.5", "must be between 0.98 and 1, which is what SentencePiece takes"),
    ("image_tower.std", "[0, 0, 0]", "image_tower.std is [0.0, 0.0, 0.0], but it must be three finite numbers greater"),
    ("image_tower.mean", "[.nan, 1, 1]", "image_tower.mean is [nan, 1.0, 1.0], but it must be three finite numbers"),
    ("loss.logit_scale", "1e30", "loss.logit_scale is 1e+30, but it must be greater than 0 and at most 1,000,000"),
    ("loss.logit_bias", "-1e30", "loss.logit_bias is -1e+30, but it must be between -1,000,000 and 1,000,000"),
    ("train.epochs", "1e30", "train.epochs is 1e+30, but it must be greater than 0 and at most 1,000,000"),
    ("train.examples", "9" * 5000, "over.yaml, line 2: a number has 5,000 digits; shorten it"),
    ("train.examples", "99999999999999B", "train.examples is '99999999999999B', but it must be a number of examples"),
    ("eval.paper", "{a: .nan}", "eval.paper is {'a': nan}, but it must be a mapping to finite numbers"),
    ("optim.clip", ".inf", "optim.clip is inf, but it must be a finite number, 0 or greater"),
    ("name", "../../elsewhere", "name is '../../elsewhere', but it must be the name of a folder: printable characters"),
    ("name", "é" * 300, "but it must be the name of a folder: printable characters, at most 200 bytes"),
    ("name", '"a\\nb"', "name is 'a\\nb', but it must be the name of a folder"),
    ("output_dir", "''", "output_dir is '', but it must have a visible character; leave it out for the default"),
    ("cache.path", '"a\\0b"', "cache.path is 'a\\x00b', but it must be valid Unicode without null characters"),
    ("output_dir", '"\\uD83D"', "is half of a surrogate pair; write the character out"),
    ("data.train.separator", "ab", "data.train.separator is 'ab', but it must be one character, such as ',' or '\\t'"),
]


@pytest.mark.parametrize(("name", "value", "line"), FIELD_LINES)
def test_a_wrong_value_in_a_file(name, value, line, base, capsys, one_parser):
    (base / "over.yaml").write_text(nested(name, value))
    given = refused(capsys, base, "train", "-c", "experiment.yaml", "-c", "over.yaml")
    assert line in given


def nested(name, value):
    parts = name.split(".")
    return "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(parts))[:-1] + f" {value}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--output_dir", "\udcff"), r"output_dir is '\udcff', but it must be valid Unicode without null characters"),
        (("--output_dir", ""), "output_dir is '', but it must have a visible character; leave it out for the default"),
        (("--data.train.path", ""), "data.train.path is '', but it must have a visible character"),
        (("--tokenizer.path", " "), "tokenizer.path is ' ', but it must have a visible character"),
        (("--text_tower.width", "33"), "text_tower.width 33 is not divisible by text_tower.heads 2; change one of"),
        (("--text_tower.locked", "true"), "text_tower.locked is set, but random weights must be trained"),
        (("--output_dir", "train.csv"), "train.csv is a file, but results need a folder; choose another --output_dir"),
        (("-c", "a\0b"), "cannot read the experiment file a\\x00b: no file has such a name"),
        (("-c", ""), "there is no experiment file ''"),
    ],
)
def test_a_wrong_value_on_the_command_line(words, line, cached, project, capsys, one_parser):
    """Also of a training for which everything else is there: no tokenizer is trained first."""
    given = refused(capsys, project, "train", "-c", "experiment.yaml", "--output_dir", "runs/new", *words)
    assert line in given


def test_no_line_of_a_file_reaches_the_terminal_as_a_command(base, capsys, one_parser):
    (base / "bad.csv").write_bytes(b"\x1b[2J\x07,\x7f\n1,2\n")
    words = ("tokenizer", "train", "-c", "experiment.yaml", "--data.train.path", "bad.csv")
    assert r"its columns: \x1b[2J\x07, \x7f. Set image_column." in refused(capsys, base, *words)


def test_a_failure_with_a_stack_of_frames_is_one_line(monkeypatch, capsys, base, one_parser):
    def fail(experiment, **_):
        raise TypeError("empty(): overflow\nException raised from a.h:75\nframe #0: c10::Error")

    monkeypatch.setattr("siglit.commands.Command.load", lambda _: fail)
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "siglit: TypeError: empty(): overflow (add --debug for the traceback)\n"


WRONG = ["''", "-1", "1.5", ".nan", ".inf", "1" + "0" * 25, "true", "[]", "[a]", "[[1]]", "{}", "{a: 1}", '"a\\0b"']


@pytest.mark.slow
def test_wrong_values_of_every_field_through_the_whole_command(base, capsys, one_parser):
    """1,500 cases: each is refused in one line that names the field, or accepted by `parse`."""
    refusals = 0
    for name, kind in FIELDS.items():
        for value in WRONG:
            tree_of_values = yaml.safe_load(nested(name, value))
            if name.startswith("data.val."):
                tree_of_values["data"]["val"] = {"format": "csv", "path": "val.csv"} | tree_of_values["data"]["val"]
            (base / "over.yaml").write_text(yaml.safe_dump(tree_of_values))
            try:
                assert isinstance(parse("plan", "-c", "over.yaml"), Experiment)
            except UserError:
                line = refused(capsys, base, "plan", "-c", "experiment.yaml", "-c", "over.yaml")
                assert name.rpartition(".")[2] in line or is_free_form(kind), line
                refusals += 1
    assert refusals > 1000
