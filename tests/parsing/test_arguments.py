"""What a user passes is data: it is checked by name and type, reported in one line, and never run."""

import re
import shutil
from contextlib import nullcontext as does_not_raise

import pytest
import yaml

from siglit.cli import main
from siglit.commands import COMMANDS
from siglit.config import COUNTS
from siglit.errors import UserError
from siglit.parsing import arguments
from siglit.parsing.fields import FIELDS, SECTIONS, describe_type, is_free_form, is_list
from tests.test_cli import fails

FREE_FORM = [name for name, kind in FIELDS.items() if is_free_form(kind)]
ATTACK = {"class_path": "attacker.Attack", "init_args": {"name": "called"}}
ATTACKER = """
import pathlib
here = pathlib.Path(__file__).parent
(here / "imported").touch()
class Attack:
    def __init__(self, name: str = "called"):
        (here / name).touch()
"""
BASE = "data: {train: {format: csv, path: none.csv}}\n"


@pytest.fixture(scope="module")
def parser():
    """Built once: this takes longest of parsing."""
    return arguments._parser("siglit train", COMMANDS["train"])


@pytest.fixture
def parse(parser, tmp_path, monkeypatch):
    """Parse words, and a file of the given content."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.setattr(arguments, "_parser", lambda *_: parser)

    def parsed(*words, content=None):
        files = ["-c", "base.yaml"]
        if content is not None:
            (tmp_path / "given.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
            files += ["-c", "given.yaml"]
        return arguments.parse_command("train", [*files, *words])[0]

    return parsed


@pytest.fixture
def attacker(tmp_path, monkeypatch):
    """A module that writes a file when it is imported, and another when its class is called; returns their names."""
    (tmp_path / "attacker").mkdir()
    (tmp_path / "attacker" / "attacker.py").write_text(ATTACKER)
    monkeypatch.syspath_prepend(tmp_path / "attacker")

    def left():
        shutil.rmtree(tmp_path / "attacker" / "__pycache__", ignore_errors=True)
        return sorted(path.name for path in (tmp_path / "attacker").iterdir() if path.name != "attacker.py")

    return left


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("section", sorted({name.rpartition(".")[0] for name in FIELDS}))
def test_no_field_executes_its_value(section, parse, attacker):
    """Every field of the experiment, later ones too: in a file and as an option; in a list where it takes lists."""
    for name in (name for name in FIELDS if name.rpartition(".")[0] == section):
        value = [ATTACK] if is_list(FIELDS[name]) else ATTACK
        with pytest.raises(UserError, match=re.escape(name)):
            parse(content=nested(name, value))
        # On the command line, braces are a string where the field takes one.
        takes = does_not_raise() if "a string" in describe_type(FIELDS[name]) else pytest.raises(UserError, match=name)
        refused = name.startswith("data.val.") or name in (*COUNTS, "data.train.separator")
        with pytest.raises(UserError) if refused else takes:
            parse(f"--{name}", str(value))
    assert attacker() == []


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_no_section_executes_its_value(name, parse, attacker):
    for value in (ATTACK, "attacker.Attack", [ATTACK]):
        with pytest.raises(UserError, match=re.escape(name)):
            parse(content=nested(name, value))
        with pytest.raises(UserError, match=re.escape(name)):
            parse(f"--{name}", str(value))
    assert attacker() == []


@pytest.mark.parametrize(
    "name", [name for name in FREE_FORM if "mapping of names to values" in describe_type(FIELDS[name])]
)
def test_a_free_form_field_executes_nothing_however_deep(name, parse, attacker):
    assert FREE_FORM
    for value in (ATTACK, [ATTACK], {"deep": [[ATTACK]]}, {"class_path": "attacker.Attack"}):
        with pytest.raises(UserError, match=rf"^{re.escape(name)}\.x\S* holds class_path, but nothing is .* called"):
            parse(content=nested(name, {"x": value}))
        for words in ((f"--{name}.x", str(value)), (f"--{name}", str({"x": value})), (f"--{name}.x={value}",)):
            with pytest.raises(UserError, match=rf"^{re.escape(name)}\.x\S* holds class_path"):
                parse(*words)
    assert attacker() == []


@pytest.mark.parametrize("command", ["plan", "report"])
def test_commands_refuse_a_call_in_model_args(command, tmp_path, monkeypatch, capsys, attacker):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE + yaml.safe_dump({"image_tower": {"model_args": {"x": ATTACK}}}))
    assert "image_tower.model_args.x holds class_path" in fails(capsys, command, "-c", "base.yaml")
    assert attacker() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attacker", "base.yaml"]


def test_help_imports_nothing_that_is_named_on_the_command_line(tmp_path, monkeypatch, attacker, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--data.val.help", "attacker.Attack"])
    assert attacker() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: !!python/object/apply:attacker.Attack []", "line 1: .*python/object/apply:attacker.Attack is not"),
        ("optim: !!python/name:attacker.Attack", "line 1: .*python/name:attacker.Attack is not"),
        ("image_tower: {model_args: {x: !!binary aGk=}}", "!!binary is not"),
        ("image_tower: {model_args: {x: !!timestamp 2020-01-01}}", r"image_tower.model_args.x is a date"),
        ("optim: other.yaml", "line 1: optim is other.yaml, but it must be a mapping of fields to values"),
        ("data: {val: other.yaml}", "line 1: data.val is other.yaml, but it must be a mapping of fields to values"),
        ("config: other.yaml", "line 1: config is not a field"),
        ("optim: &all {name: lion, betas: [*all]}", "line 1: a value contains itself"),
        ("? [name, seed]\n: 3", "a key must be a string"),
        ("optim: {<<: {lrr: 3}}", "line 1: optim.lrr is not a field; did you mean optim.lr"),
        ("train: {steps: 3}\n---\nseed: 3", "is not YAML"),
    ],
)
def test_a_file_holds_data_and_names_no_other_file(content, message, parse, attacker, tmp_path):
    (tmp_path / "other.yaml").write_text("{seed: 7, lr: 7, format: csv, path: other.csv}")
    with pytest.raises(UserError, match=message):
        parse(content=content)
    assert attacker() == []


@pytest.mark.parametrize("words", [("--optim", "other.yaml"), ("-c", "{seed: 7}"), ("--data.val", "other.yaml")])
def test_an_option_is_read_as_a_file_only_after_c(words, parse, tmp_path):
    (tmp_path / "other.yaml").write_text("{lr: 7}")
    with pytest.raises(UserError, match=re.escape(words[1])):
        parse(*words)


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if is_free_form(kind) or "list" in str(kind)])
def test_a_field_of_names_or_lists_reads_no_file(name, parse, tmp_path):
    (tmp_path / "other.yaml").write_text("{x: 1}")
    with pytest.raises(UserError, match=f"{name} (is|has) .*other.yaml"):
        parse(f"--{name}", "other.yaml")


def test_braces_with_a_dollar_stay_a_string(parse, monkeypatch):
    """Only paths expand variables, and only where they are used."""
    monkeypatch.setenv("SECRET", "x")
    text = "${oc.env:SECRET} ${SECRET} ${name}"
    assert parse(content={"name": text}).name == text
    assert parse("--name", text).name == text


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.warm_up_steps", "optim.warmup_steps"),
        ("train.lr", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("sed", "seed"),
        ("data.tain.path", "data.train.path"),
        ("data.train.foldd", "data.train.fold"),
        ("data.val.foldd", "data.val.fold"),
        ("steps", "train.steps"),
        ("image_tower.modelargs", "image_tower.model_args"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(mistyped, nearest, parse):
    file = f"given.yaml, line {mistyped.count('.') + 1}: {mistyped} is not a field; did you mean {nearest}?"
    option = f"--{mistyped} is not an option of siglit train; did you mean --{nearest}?"
    wrong = mistyped if "." in mistyped and mistyped.rpartition(".")[0] in SECTIONS else None
    with pytest.raises(UserError, match=re.escape(file) if wrong else "is not a field"):
        parse(content=nested(mistyped, 1))
    for words in ((f"--{mistyped}", "1"), (f"--{mistyped}=1",)):
        with pytest.raises(UserError, match=f"^{re.escape(option)}$"):
            parse(*words)


def test_a_name_unlike_any_other_gets_those_of_its_section(parse):
    with pytest.raises(UserError, match=r"cache.rows is not a field; the fields of cache are accelerator, .*, splits$"):
        parse(content={"cache": {"rows": 1}})
    with pytest.raises(UserError, match="--zzz is not an option of siglit train; see siglit train --help$"):
        parse("--zzz", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "there is no command 'trian'; did you mean train?"),
        (("cache", "inof"), "there is no command 'cache inof'; did you mean cache info?"),
        (("plan", "--device", "3"), "--device is not an option of siglit plan; did you mean --devices?"),
        (
            ("cache", "verify", "x", "--repare"),
            "--repare is not an option of siglit cache verify; did you mean --repair?",
        ),
    ],
)
def test_a_mistyped_command_or_option_of_its_own_gets_the_nearest_one(words, message, capsys):
    assert message in fails(capsys, *words)


def test_files_and_options_are_merged(parse):
    """Dotted names, appended items, sections as a whole, and names merged by YAML are accepted."""
    experiment = parse(
        *("--eval.shots+", "3", "--optim", "{clip: 2}", "--image_tower.model_args.depth", "4", "--data.val", "null"),
        content="loss.logit_scale: 5\noptim: {<<: {warmup_steps: 3}}\n"
        "image_tower: {model_args: {img_size: [32, 48]}}\n",
    )
    assert experiment.eval.shots == [1, 5, 10, 25, 3]
    assert (experiment.loss.logit_scale, experiment.optim.warmup_steps, experiment.optim.clip) == (5, 3, 2)
    assert experiment.image_tower.model_args == {"img_size": [32, 48], "depth": 4}
    assert experiment.data.val is None


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (("--eval.shots", "5"), [5]),
        (("--eval.shots=1,5",), [1, 5]),
        (("--eval.shots", "[2]"), [2]),
        (("--cache.splits", "val"), ["val"]),
        (("--optim.betas", "0.9,0.99"), (0.9, 0.99)),
        (("--image_tower.mean", "null"), None),
    ],
)
def test_a_list_of_one_needs_no_brackets_on_the_command_line(words, read, parse):
    section, name = words[0].removeprefix("--").partition("=")[0].split(".")
    assert getattr(getattr(parse(*words), section), name) == read


WRONG = {
    "a whole number": "1.5",
    "a number": "fast",
    "true or false": "maybe",
    "a list": "[[nested]]",
    "a mapping": "3",
}


@pytest.mark.parametrize("section", sorted({name.rpartition(".")[0] for name in FIELDS}))
def test_a_wrong_value_is_reported_with_what_the_field_takes(section, parse):
    """Every field: its name, the value, what it takes; no names of Python types."""
    for name, kind in FIELDS.items():
        expected = describe_type(kind)
        wrong = next((value for start, value in WRONG.items() if expected.startswith(start)), "nonsense")
        if name.rpartition(".")[0] != section or expected.startswith("a string") or "or a string" in expected:
            continue
        for source in ({"words": (f"--{name}", wrong)}, {"content": nested(name, yaml.safe_load(wrong))}):
            with pytest.raises(UserError) as error:
                parse(*source.get("words", ()), content=source.get("content"))
            assert re.fullmatch(
                rf"{re.escape(name)} (is|has) .*, but it must be {re.escape(expected)}", str(error.value)
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval.split", "test"), "eval.split is test, but it must be val or train"),
        (("--eval.shots", "few"), "eval.shots has few, but it must be a list of whole numbers, such as [1, 5]"),
        (("--train.steps", "1.5"), "train.steps is 1.5, but it must be a whole number, or null"),
        (("--train.steps", ""), "train.steps is '', but it must be a whole number, or null"),
        (("--optim.betas", "[0.9]"), "optim.betas is [0.9], but it must be a list of 2 numbers, such as"),
        (("--data.val.format", "png", "--data.val.path", "x"), "data.val.format is png, but it must be csv, jsonl,"),
        (("--data.val.path", "x"), "data.val.format is missing; give data.val a format and a path"),
        (("--train.steps", "3", "4"), "4 does not belong to an option"),
        (("--optim.lr", "null"), "optim.lr is None, but it must be a number"),
        (
            ("--eval", "null"),
            "eval is null, but it must be a mapping of fields to values, or set one field with --eval.checkpoint VALUE",
        ),
    ],
)
def test_messages_about_wrong_values(words, message, parse):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse(*words)


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if "null" not in describe_type(kind)])
def test_null_is_refused_for_fields_that_need_a_value(name, parse):
    others = {"data": {"val": {"format": "csv", "path": "x"}}}
    content = nested(name, None)
    if name.startswith("data.val."):
        others["data"]["val"][name.rpartition(".")[2]] = None
        content = others
    with pytest.raises(UserError, match=re.escape(name)):
        parse(content=content)


@pytest.mark.parametrize("spelling", ["-cgiven.yaml", "--config=given.yaml", "-c given.yaml", "--config given.yaml"])
def test_a_file_is_checked_however_it_is_given(spelling, parse, tmp_path, attacker):
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"image_tower": {"model_args": {"x": ATTACK}}, "seeed": 1}))
    with pytest.raises(UserError, match="given.yaml, line 7: seeed is not a field; did you mean seed"):
        parse(*spelling.split())
    assert arguments._names_config(spelling.split())
    assert attacker() == []
