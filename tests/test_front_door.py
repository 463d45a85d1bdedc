"""`import siglit`: lazy, complete and typed; its functions return results and raise errors, and never print or exit."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import siglit
from siglit.commands import COMMANDS
from tests.conftest import ROOT

SCRIPT = """
import torch

import siglit
from siglit import Experiment, train
from siglit.loss import softmax_loss


def evaluate(path: str) -> float:
    experiment: Experiment = siglit.load_experiment(path, **{"train.steps": 3})
    rows: int = siglit.precompute(experiment).splits["train"].rows
    loss: float = train(experiment).metrics["train/loss"]
    names: list[str] = siglit.search(experiment, "a red square").keys
    sound: int = siglit.cache_verify("cache/small").exit_code
    width: int = siglit.EmbeddingCache("cache/small/train").dim
    try:
        return siglit.eval_retrieval(experiment).metrics["image_to_text/R@1"]
    except (siglit.UserError, siglit.CacheError):
        return rows + loss + len(names) + sound + width


def losses(zimg: torch.Tensor, ztxt: torch.Tensor) -> list[torch.Tensor]:
    first = siglit.sigmoid_loss(zimg, ztxt, 10.0, -10.0, exchange="shift")
    return [first, softmax_loss(zimg, ztxt, 10.0, chunk_size=64)]
"""


def test_import_loads_no_heavy_package():
    code = (
        "import sys, siglit\n"
        "siglit.Experiment, siglit.UserError, dir(siglit)\n"
        "heavy = {'torch', 'lightning', 'numpy', 'timm', 'transformers', 'faiss', 'h5py', 'jsonargparse'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", siglit.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(siglit, name).__doc__.strip()
    assert name in dir(siglit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = siglit.trian


def test_every_command_has_a_function_of_its_name():
    for name, command in COMMANDS.items():
        function = command.function.partition(":")[2]
        assert function == name.replace("-", "_").replace(" ", "_")
        for entry in (command, *command.alternatives.values()):
            assert getattr(siglit, entry.function.partition(":")[2]) is entry.load()


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "siglit/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {(alias.name, node.module) for node in imports for alias in node.names} == set(siglit._MODULES.items())
    assert all(alias.asname == alias.name for node in imports for alias in node.names)


@pytest.mark.slow
def test_a_users_script_passes_mypy_strict(tmp_path):
    """A wrong type of a result or of an argument does not."""
    wrong = [("rows: int", "rows: str"), ('exchange="shift"', 'exchange="ring"'), ("chunk_size=64", 'chunk_size="64"')]
    for text, passes in ((SCRIPT, True), *((SCRIPT.replace(*change), False) for change in wrong)):
        (tmp_path / "script.py").write_text(text)
        command = ["mypy", "--strict", "--follow-imports=silent", "--config-file=", "script.py"]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--cache-dir", str(ROOT / ".mypy_cache")],
            cwd=tmp_path,
            env={"MYPYPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) is passes, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("overrides", "section", "field", "value"),
    [
        ({"name": "other"}, None, "name", "other"),
        ({"output_dir": Path("some/folder")}, None, "output_dir", "some/folder"),
        ({"output_dir": "with = and spaces"}, None, "output_dir", "with = and spaces"),
        ({"seed": 7}, None, "seed", 7),
        ({"optim.lr": 1e-5}, "optim", "lr", 1e-5),
        ({"optim": {"lr": 2e-5, "clip": 0}}, "optim", "lr", 2e-5),
        ({"optim.betas": (0.8, 0.9)}, "optim", "betas", (0.8, 0.9)),
        ({"eval.shots": [2, 3]}, "eval", "shots", [2, 3]),
        ({"data.val": None}, "data", "val", None),
        ({"data": {"val": None}}, "data", "val", None),
        ({"train.resume": True}, "train", "resume", True),
        ({"train.examples": "2K"}, "train", "examples", "2K"),
        ({"image_tower.model_args": {"depth": 3}}, "image_tower", "model_args", {"depth": 3}),
        ({"eval.paper": {"zeroshot/top1": 79.7}}, "eval", "paper", {"zeroshot/top1": 79.7}),
        ({"eval.name": "-c"}, "eval", "name", "-c"),
    ],
)
def test_load_experiment_takes_python_values(experiment, overrides, section, field, value):
    loaded = siglit.load_experiment("experiment.yaml", **overrides)
    assert getattr(getattr(loaded, section) if section else loaded, field) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 1}, "^optim.lrr is not a field of an experiment; did you mean optim.lr"),
        ({"optim.lr": "fast"}, "^optim.lr is fast, but it must be a number"),
        ({"eval.shots": []}, r"^eval.shots is \[\], but it must be a list of numbers of 1 or more"),
        ({"optim.lr": None}, "^optim.lr is None, but it must be a number"),
        ({"optim": {"lrr": 1}}, "optim.lrr is not a field"),
        ({"optim": 3}, "^optim is 3, but it must be a mapping"),
        ({"seed": [1]}, "^seed is .*, but it must be a whole number"),
        ({"seed": object()}, "^seed has the type object "),
        ({"image_tower.model_args": {"x": {"class_path": "os.system"}}}, "holds class_path"),
        ({"help": True}, "^help is not a field"),
        ({"help-all": True}, "^help-all is not a field"),
        ({"data.val.help": "x"}, "^data.val.help is not a field"),
        ({"print_config": "x"}, "^print_config is not a field"),
        ({"config": "other.yaml"}, "^config is not a field"),
        ({"resume": True}, "^resume is not a field"),
        ({"image_tower.model_args.depth=3": 4}, "^image_tower.model_args.depth=3 is not a field"),
    ],
)
def test_load_experiment_refuses_unknown_fields_and_invalid_values(experiment, capsys, overrides, message):
    with pytest.raises(siglit.UserError, match=message):
        siglit.load_experiment("experiment.yaml", **overrides)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["missing.yaml", Path("missing.yaml"), "--help", "-c"])
def test_load_experiment_names_a_missing_file(experiment, path):
    with pytest.raises(siglit.UserError, match=f"there is no experiment file {path}$"):
        siglit.load_experiment(path)


def test_functions_print_nothing_to_stdout(trained, project, capfd):
    siglit.cache_info("cache/small")
    siglit.cache_verify("cache/small")
    siglit.eval_retrieval(trained)
    siglit.search(trained, "a red square")
    siglit.report(trained)
    with pytest.raises(siglit.CacheError):
        siglit.cache_info("nowhere")
    assert capfd.readouterr().out == ""
