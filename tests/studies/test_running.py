"""Studies that are run: what is trained and what is not, and that records are the same whatever happened meanwhile."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import time

import pytest
import yaml

import siglit
from siglit.errors import UserError
from siglit.studies import running
from siglit.studies.grid import final_runs, progress
from siglit.studies.records import columns, flatten, last_values, read_records
from siglit.studies.running import load_run
from siglit.studies.study_file import read_study
from tests.conftest import ROOT, copy, parse, run_siglit
from tests.studies.test_definition import make_values

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TIMES = re.compile(r"time/|train/examples_per_second")


@pytest.fixture
def folder(project, prepared, monkeypatch):
    """A folder with data, caches and a tokenizer, where the test works; see `write`."""
    monkeypatch.chdir(project)
    copy(prepared / "cache", project)
    copy(prepared / "runs/small/tokenizer.model", project)
    return project


def write(name="small", **changes):
    """Write a study of two arms whose runs take 2 steps; two seeds, unless a file's own are taken."""
    values = make_values(
        name=name,
        base="experiment.yaml",
        set={"train.steps": 2, "train.val_every": 0, "tokenizer.path": "tokenizer.model"},
        axes={"loss": {"softmax": {"loss.name": "softmax", "loss.logit_bias": None}, "sigmoid": {}}},
    )
    with open(f"{name}.yaml", "w") as file:
        yaml.safe_dump(values | changes, file, sort_keys=False)
    return f"{name}.yaml"


def two_seeds(path, **options):
    """A study file has at least five; here two are enough."""
    return dataclasses.replace(read_study(path, **options), seeds=2)


def run(path, out="out", **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siglit.commands.study.read_study", two_seeds)
        return siglit.study_run(path, out=out, work="work", **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory, prepared):
    """Records and runs of the study that `write` writes, made once; no test changes them."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for path in ("images", "train.csv", "val.csv", "experiment.yaml", "cache", "runs/small/tokenizer.model"):
            copy(prepared / path, folder)
        assert run(write(curves=["train/loss"])).trained == 4
    return folder


@pytest.fixture
def complete(folder, done):
    """The folder with a complete study."""
    write(curves=["train/loss"])
    for name in ("out", "work"):
        copy(done / name, folder)
    return folder


def comparable(folder, study="small"):
    """Records without what depends on times and the machine, by file."""
    kept = {}
    for path in sorted((folder / "data" / study).glob("*.json")):
        values = json.loads(path.read_bytes())
        for name in ("seconds", "examples_per_second", "commit", "hardware"):
            del values[name]
        values["results"] = {name: value for name, value in values["results"].items() if not TIMES.match(name)}
        kept[path.name] = values
    return kept


def test_a_study_is_trained_once(complete):
    """A second call trains nothing; a run's weights are removed, its experiment, metrics and results stay."""
    folder, before = complete, comparable(complete / "out")
    second = run("small.yaml")
    assert (second.trained, second.complete, second.total) == (0, 4, 4)
    assert "small: 0 runs in 0:00; 4 of 4 runs of the study are complete" in str(second)
    assert comparable(folder / "out") == before
    for made in (folder / "work/small").glob("loss-*"):
        names = {inner.name for inner in made.iterdir()}
        assert {"experiment.yaml", "metrics.csv", "retrieval.json", "summary.json"} <= names
        assert {inner.suffix for inner in made.iterdir()} <= {".json", ".csv", ".yaml"}


def test_a_record_holds_no_path(complete, done):
    """Neither of the machine nor of the run; results are finite numbers."""
    for path in (complete / "out/data/small").glob("*.json"):
        text = path.read_text()
        assert str(done) not in text
        assert "work/" not in text
        assert ".csv" not in text
    made = read_records(complete / "out/data/small", "small")
    assert {"train/loss", "train/logit_scale", "retrieval/image_to_text/R@10"} <= made[0].results.keys()
    assert made[0].curves.keys() == {"step", "train/loss"}


def test_results_are_those_of_the_commands(complete):
    """A run of a study is a run of `siglit train` and `siglit eval-retrieval` with the same fields."""
    (made,) = (
        r for r in read_records(complete / "out/data/small", "small") if (r.arm["loss"], r.seed) == ("softmax", 1)
    )
    words = ["--train.steps", "2", "--train.val_every", "0", "--tokenizer.path", "tokenizer.model", "--seed", "1"]
    words += ["--loss.name", "softmax", "--loss.logit_bias", "null", "--output_dir", "by-hand"]
    experiment = parse("train", *words)
    metrics = siglit.train(experiment).metrics
    retrieval = flatten("retrieval", siglit.eval_retrieval(experiment).to_json())
    assert made.results["train/loss"] == float(f"{metrics['train/loss']:.7g}")
    assert made.results["train/grad_norm"] == float(f"{metrics['train/grad_norm']:.7g}")
    assert {name: value for name, value in made.results.items() if name.startswith("retrieval/")} == retrieval


def test_a_changed_file_trains_what_has_changed(complete):
    """And the earlier records of these arms are stale until they are trained again."""
    folder, before = complete, comparable(complete / "out")
    axes = {"loss": {"softmax": {"loss.name": "softmax", "loss.logit_bias": None}, "sigmoid": {"optim.lr": 0.01}}}
    study = two_seeds(write(axes=axes, curves=["train/loss"]))
    state = progress(study, read_records(folder / "out/data/small", "small"))
    assert {record.arm["loss"] for record in state.stale} == {missing.arm["loss"] for missing in state.missing}
    assert [record.arm["loss"] for record in state.stale] == ["sigmoid", "sigmoid"]
    assert run("small.yaml").trained == 2
    after = comparable(folder / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "sigmoid" in name}


def test_a_common_run_is_trained_once(complete):
    """By two studies, and by two arms; the record has the names of its own study, arm and learning rate."""
    axes = {"lr": {"high": {"optim.lr": 0.01}, "as before": {}, "the same": {"train.steps": 2}}}
    expect = [expectation("lr", "high", "as before")]
    done = run(write("other", axes=axes, expect=expect, curves=["train/loss"]))
    assert (done.trained, done.complete) == (2, 6)
    mine, theirs = comparable(complete / "out", "other"), comparable(complete / "out")
    copied = mine["lr-as-before.final.s1.json"]
    assert copied["results"] == theirs["loss-sigmoid.final.s1.json"]["results"]
    assert (copied["study"], copied["arm"]) == ("other", {"lr": "as before"})
    grid = run(write("grid", learning_rates=[0.003], curves=["train/loss"]))
    assert (grid.trained, grid.complete, grid.total) == (0, 4, 4)


def expectation(axis, plus, minus):
    return {"say": "ahead", "plus": [{axis: plus}], "minus": [{axis: minus}], "measure": "R@10"}


def test_a_common_run_without_a_needed_result_is_trained(complete):
    """A record has no results of single languages, unless a measure of its study names them."""
    for path in (complete / "out/data/small").glob("*.json"):
        values = json.loads(path.read_text())
        del values["results"]["retrieval/image_to_text/R@10"]
        path.write_text(json.dumps(values))
    assert run(write("other", curves=["train/loss"]), part="1/2").trained == 2


def test_damaged_records_of_another_study_do_no_harm(complete):
    """Those of the study itself are named."""
    (complete / "out/data/other").mkdir()
    (complete / "out/data/other/x.json").write_text("{")
    assert run("small.yaml").trained == 0
    (complete / "out/data/small/x.json").write_text("{")
    with pytest.raises(UserError, match=r"small/x.json is damaged"):
        run("small.yaml")


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_not_finite_is_a_record(folder, devices):
    """Its record says so, names no path, and is not trained again; curves have gaps there."""
    axes = {"lr": {"huge": {"optim.lr": 1e30, "optim.warmup_steps": 0}, "small": {}}}
    fields = {"train.steps": 4, "train.log_every": 1, "train.val_every": 0, "tokenizer.path": "tokenizer.model"}
    fields["train.devices"] = devices
    path = write(axes=axes, set=fields, expect=[expectation("lr", "small", "huge")], curves=["train/loss"])
    assert run(path, part="1/2").complete == 2
    failed = [record for record in read_records(folder / "out/data/small", "small") if record.failed is not None]
    assert [record.arm["lr"] for record in failed] == ["huge", "huge"]
    assert all(record.results == {} and re.search("finite|nan", record.failed) for record in failed)
    assert not any(re.search(r"/|\.png|batch of", record.failed) for record in failed)
    assert run(path, part="1/2").trained == 0


def test_kept_checkpoints_of_final_runs_are_evaluated(folder):
    """Those of the runs that only choose a learning rate are not."""
    fields = {"train.steps": 2, "train.val_every": 0, "tokenizer.path": "tokenizer.model"}
    changes = {"kept": ["eval-retrieval"], "learning_rates": [1e-3, 2e-3, 3e-3]}
    with pytest.raises(UserError, match="small.yaml evaluates kept checkpoints, but train.keep_every is 0"):
        run(write(set=fields, **changes), part="1/2")
    run(write(set=fields | {"train.keep_every": 1}, **changes), part="1/2")
    records = read_records(folder / "out/data/small", "small")
    assert [record.stage for record in records] == ["final"] * 2 + ["select"] * 3
    for record in records[:2]:
        assert record.curves["kept/step"] == [0, 1, 2]
        recall = "retrieval/image_to_text/R@10"
        assert record.curves[f"kept/{recall}"][2] == record.results[recall]
    assert all(record.curves == {} for record in records[2:])


def test_the_test_split_has_a_cache_of_its_own(folder):
    """Made once; with the cache of another split, siglit refuses in one line."""
    lines = (folder / "val.csv").read_text().splitlines()
    (folder / "test.csv").write_text("\n".join(lines[:13]) + "\n")
    run(write(test={"data.val.path": "test.csv", "cache.path": "cache/test", "eval.name": "test"}), part="1/2")
    record = read_records(folder / "out/data/small", "small")[0]
    assert record.results["retrieval/images"] == 6
    (result,) = {path.name for path in (folder / "work/small").glob("loss-*/retrieval*.json")}
    assert result == "retrieval-test.json"
    with pytest.raises(siglit.CacheError) as error:
        run(write("other", test={"data.val.path": "test.csv"}))
    assert "\n" not in str(error.value)


def test_a_stopped_run_loses_no_result(folder):
    """A run that was stopped after its last logged step has logged nothing since it was resumed."""
    fields = {"train.steps": 5, "train.log_every": 4, "train.val_every": 0, "tokenizer.path": "tokenizer.model"}
    study = dataclasses.replace(read_study(write(set=fields)), seeds=1)
    undisturbed = running.run_study(study, folder / "a", folder / "work-a", (1, 2))
    first = final_runs(study, study.arms()[0], None)[0]
    experiment = load_run(first, folder / "work-b/small" / first.folder)
    siglit.train(experiment)
    (experiment.folder / "summary.json").unlink()  # as if it was killed before its last line
    again = running.run_study(study, folder / "b", folder / "work-b", (1, 2))
    assert undisturbed.complete == again.complete == 1
    assert comparable(folder / "a") == comparable(folder / "b")


def test_weights_that_a_killed_process_left_are_removed(complete):
    left = next((complete / "work/small").glob("loss-*")) / "checkpoints"
    left.mkdir()
    (left / "last.ckpt").write_bytes(b"weights")
    run("small.yaml")
    assert not left.exists()


def test_a_base_that_changes_meanwhile_stops_the_study(folder, monkeypatch):
    """The record would have the digest of another experiment."""
    path, train = write(), running.train

    def change(experiment):
        (folder / "experiment.yaml").write_text((folder / "experiment.yaml").read_text().replace("0.003", "0.004"))
        return train(experiment)

    monkeypatch.setattr(running, "train", change)
    with pytest.raises(UserError, match=r"experiment.yaml has changed since the study was started"):
        run(path)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", ""])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="--part is .*, but it must be a part's number and their count, such as 2/4"):
        run("none.yaml", part=part)


def test_more_parts_than_arms(folder):
    assert run(write(), part="7/9").trained == 0


def test_a_base_that_does_not_exist_is_refused(folder):
    with pytest.raises(UserError, match=r"there is no experiment file .*none.yaml"):
        run(write(base="none.yaml"))


def test_records_that_cannot_be_written_are_refused_before_training(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"records cannot be written into file/data/small: Not a directory; choose"):
        run(write(), out="file")
    assert not (folder / "work").exists()


def test_columns_of_metrics(tmp_path):
    """What is not finite is a gap; the last values are those of each column."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,a,b\r\n0,0,1.5,\r\n1,0,nan,\r\n1,0,,7\r\n2,0,inf,\r\n3,0,0.123456789,\r\n")
    assert columns(path, ("a",)) == {"step": [0.0, 1.0, 2.0, 3.0], "a": [1.5, None, None, 0.12346]}
    assert last_values(path) == {"a": 0.123456789, "b": 7.0}
    assert columns(tmp_path / "none.csv", ("a",)) == last_values(tmp_path / "none.csv") == {}


def start(folder, *words):
    command = [sys.executable, "-m", "siglit", "study", "run", "-c", "small.yaml", "--out", "out", "--work", "work"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    with (folder / f"log{'-'.join(words).replace('/', '-')}.txt").open("a") as log:
        return subprocess.Popen([*command, *words], cwd=folder, env=env, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared):
    """A study without caches and tokenizer, for other processes, and the records of one that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("images", "train.csv", "val.csv", "experiment.yaml"):
        copy(prepared / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(set={"train.steps": 6, "train.val_every": 2}, learning_rates=[0.001, 0.003, 0.01])
        run_siglit("study", "run", "-c", "small.yaml", "--out", "out", "--work", "work", cwd=folder, check=0)
    return folder


def without_results(folder, tmp_path):
    for name in ("images", "train.csv", "val.csv", "experiment.yaml", "small.yaml"):
        copy(folder / name, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_study_killed_at_random_has_the_same_records(undisturbed, tmp_path):
    """Bit for bit, apart from times; a kill in any stage, from the caches to the removal of weights."""
    folder, moments = without_results(undisturbed, tmp_path), random.Random(0)
    for _ in range(5):
        process = start(folder)
        time.sleep(moments.uniform(6, 14))  # the imports take about five seconds
        process.kill()
        process.wait()
    assert start(folder).wait() == 0
    assert comparable(folder / "out") == comparable(undisturbed / "out")
    assert len(comparable(folder / "out")) == 16
    assert not list((folder / "work").rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("1/2", "2/2"), ("1/1", "1/1")], ids=["parts", "the same study twice"])
def test_processes_at_the_same_time_have_the_records_of_one(undisturbed, tmp_path, parts):
    """They make caches and tokenizer once, and no run twice."""
    folder = without_results(undisturbed, tmp_path)
    processes = [start(folder, "--part", part) for part in parts]
    assert [process.wait() for process in processes] == [0, 0]
    assert comparable(folder / "out") == comparable(undisturbed / "out")
    logs = "".join(path.read_text() for path in folder.glob("log*.txt"))
    assert len(re.findall(r"small: run [0-9]+ of", logs)) == 16
    assert len(re.findall(r"training: 96 of 96 examples", logs)) <= 16
