"""The command: exit codes, one clear line for what is wrong, and help without waiting for torch."""

import re
import subprocess
import sys

import pytest

from siglit.cli import COMMANDS, main
from siglit.config import SourceSpec
from siglit.parsing.fields import FIELDS, SECTIONS
from tests.conftest import ROOT, parse, run_siglit


def fails(capsys, *words):
    """Run in this process; return the one line of standard error after checking exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, lines
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


def test_help_names_every_command_and_imports_no_heavy_package():
    code = (
        "import sys; from siglit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'timm', 'transformers', 'lightning', 'faiss', 'h5py', 'numpy', 'jsonargparse'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys; from siglit.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'timm', 'transformers', 'lightning', 'faiss'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--optim.warmup_steps" in done.stdout


def _help(*words):
    done = subprocess.run(
        [sys.executable, "-m", "siglit", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_of_a_command_lists_what_it_reads_and_help_all_lists_everything():
    some, everything = _help("tokenizer", "train", "--help"), _help("tokenizer", "train", "--help-all")
    assert "--tokenizer.vocab_size" in some
    assert "--text_tower.pretrained" in some
    assert "Every section of the experiment: siglit tokenizer train --help-all" in some
    for option in ("--optim.lr", "--train.steps", "--text_tower.depth", "--seed"):
        assert option not in some
        assert option in everything
    assert "SUPPRESS" not in some


def test_every_command_with_an_experiment_declares_sections_and_fields_that_exist():
    for name, command in COMMANDS.items():
        assert (command.folders is None) == (len(command.reads) > 0), name
        assert set(command.reads) <= {*FIELDS, *SECTIONS}, name


@pytest.mark.parametrize("words", [("cache",), ("cache", "--help"), ("cache", "-h"), ("tokenizer", "--help")])
def test_a_group_of_commands_lists_them(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    names = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    assert len(names) > 0
    assert all(name in printed for name in names)
    assert "eval-retrieval" not in printed


def test_every_field_has_a_help_text():
    import dataclasses
    import inspect

    from siglit import config

    for name, section in inspect.getmembers(config, dataclasses.is_dataclass):
        source = inspect.getsource(section)
        for field in dataclasses.fields(section):
            assert re.search(rf'\n    {field.name}: .*?\n    """\S', source, re.S), f"{name}.{field.name}"


def test_unknown_command_names_the_commands(capsys):
    assert "eval-retrieval" in fails(capsys, "evaluate")


def test_print_config_shows_overrides_and_defaults(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml", "--optim.lr", "0.5", "--print_config"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "lr: 0.5" in shown
    assert "warmup_steps: 2" in shown
    assert "logit_bias: auto" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "optim.lrr"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.name", "sgdd"], "optim.name"),
        (["-c", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_option_is_named(project, capsys, monkeypatch, words, message):
    monkeypatch.chdir(project)
    assert message in fails(capsys, "train", "-c", "experiment.yaml", *words)


def test_a_data_set_of_a_later_file_takes_the_place_of_an_earlier_one(project, capsys, monkeypatch):
    """Nothing of the earlier one stays, such as a fold; all else is put together field by field, and options win."""
    monkeypatch.chdir(project)
    text = (project / "experiment.yaml").read_text()
    (project / "experiment.yaml").write_text(text.replace(".csv}", ".csv, fold: 9/10}"))
    (project / "over.yaml").write_text(
        "data: {train: {format: coco, path: t.json}, val: {format: coco, path: v.json}}\n"
    )
    (project / "some.yaml").write_text("data: {val: {path: other.csv}}\ncache: {batch_size: 7}\n")
    over = parse("train", "-c", "over.yaml", "--data.val.images", "pics")
    assert over.data.train == SourceSpec("coco", "t.json")
    assert over.data.val == SourceSpec("coco", "v.json", images="pics")
    assert over.data.workers == 1
    some = parse("train", "-c", "some.yaml")
    assert some.data.val == SourceSpec("csv", "other.csv", fold="9/10")
    assert (some.cache.batch_size, some.cache.shard_size) == (7, 8)
    assert "over.yaml" in fails(capsys, "train", "-c", "experiment.yaml", "-c", "nope/over.yaml")
    (project / "list.yaml").write_text("- data\n")
    fails(capsys, "train", "-c", "experiment.yaml", "-c", "list.yaml")


def test_config_typo_is_named(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    path = project / "experiment.yaml"
    path.write_text(path.read_text().replace("warmup_steps", "warm_up_steps"))
    assert "warm_up_steps" in fails(capsys, "train", "-c", "experiment.yaml")


def test_config_that_is_not_yaml(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    (project / "experiment.yaml").write_text("name: [unclosed\n")
    assert "experiment.yaml, line 2, column 1 is not YAML: expected ',' or ']'" in fails(
        capsys, "train", "-c", "experiment.yaml"
    )


def test_yaml_cannot_run_code(project, capsys, monkeypatch):
    """A python tag in the experiment file is refused, not executed."""
    monkeypatch.chdir(project)
    (project / "experiment.yaml").write_text("name: !!python/object/apply:os.mkdir [made]\n")
    fails(capsys, "train", "-c", "experiment.yaml")
    assert not (project / "made").exists()


def test_a_failure_of_the_work_exits_1_and_debug_shows_where(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr("siglit.commands.Command.load", lambda _: lambda experiment, **_: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml"])
    message = capsys.readouterr().err
    assert stop.value.code == 1, message
    assert "ZeroDivisionError" in message
    assert "Traceback" not in message
    with pytest.raises(SystemExit):
        main(["train", "-c", "experiment.yaml", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_end_of_another_rank_is_not_reported_as_an_error_of_the_network(project, capsys, monkeypatch, rank):
    """The rank that failed says why; of the others, the first says in one line that this is not the reason."""

    def lose_connection(*_, **__):
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:3")

    monkeypatch.chdir(project)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("siglit.commands.Command.load", lambda _: lose_connection)
    with pytest.raises(SystemExit) as stop:
        main(["train", "-c", "experiment.yaml"])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:54] for line in lines] == ["siglit: another process of this run has ended, so this"] * (rank == "0")


def test_the_launchers_are_the_same_command(tmp_path):
    """`python -m siglit` and the checkout's cli.py answer alike."""
    by_module = run_siglit("--version", cwd=tmp_path, check=0).stdout
    by_file = subprocess.run([sys.executable, ROOT / "cli.py", "--version"], capture_output=True, text=True, check=True)
    assert by_file.stdout == by_module


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\nCUDA frame", "one"),
        (
            "Caught OSError in DataLoader worker process 0.\nTraceback …\nOSError: stale file handle",
            "OSError: stale file",
        ),
        (
            "NCCL error in: x.cpp\nncclSystemError: …\nLast error:\nno route to host",
            "NCCL error in: x.cpp; no route to host",
        ),
        ("", ""),
    ],
)
def test_the_line_of_a_long_message_that_says_what_happened(message, line):
    from siglit import cli

    assert cli._cause(message).startswith(line)
