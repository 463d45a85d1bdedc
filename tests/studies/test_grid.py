"""Digests of runs, the choice of the learning rate, and which records count."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from siglit.errors import UserError
from siglit.studies.definition import Expectation, Study
from siglit.studies.grid import base_fields, choose_learning_rate, final_runs, progress, selection_runs
from siglit.studies.records import Record, read_records, record_path, write_record

BASE = """
name: base
data:
  train: {format: csv, path: "${DATA}/train.csv"}
cache: {path: cache/base}
train: {batch_size: 16, steps: 6}
"""


def make_study(folder, **changes):
    base = folder / "base.yaml"
    if not base.exists():
        base.write_text(BASE)
    values = {
        "path": folder / "study.yaml",
        "name": "small",
        "title": "t",
        "claim": "c",
        "source": "s",
        "base": base,
        "axes": {"loss": {"softmax": {"loss.name": "softmax"}, "sigmoid": {}}},
        "measures": {"R@10": ("retrieval/R@10",)},
        "expect": (Expectation("ahead", ({"loss": "sigmoid"},), ({"loss": "softmax"},), "R@10"),),
        "learning_rates": (0.001, 0.003, 0.01),
        "test": {"data.val.path": "test.csv", "cache.path": "cache/test"},
    }
    return Study(**values | changes)


def digests(study):
    """Of one run of each arm and stage."""
    arms = study.arms()
    return [run.digest for arm in arms for run in (selection_runs(study, arm)[0], final_runs(study, arm, 0.001)[0])]


def record(run, value=0.5, study="small"):
    results = {} if value is None else {"retrieval/R@10": value}
    failed = "the loss is nan at step 2" if value is None else None
    return Record(study, run.arm, run.stage, run.seed, run.learning_rate, run.digest, results, failed=failed)


def all_records(study, rate=0.001):
    selected = [
        record(run, float(run.learning_rate == rate)) for arm in study.arms() for run in selection_runs(study, arm)
    ]
    return [*selected, *(record(run) for arm in study.arms() for run in final_runs(study, arm, rate))]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "title": "x", "claim": "x", "source": "x", "notes": "x", "seeds": 9},
        {"measures": {"R@1": ("retrieval/R@1",)}, "expect": ()},
        {"axes": {"objective": {"infonce": {"loss.name": "softmax"}, "b": {}}}},
        {"set": {"cache.path": "elsewhere"}},
        {"test": {"data.val.path": "test.csv", "cache.path": "another"}},
        {"learning_rates": (0.001, 0.1)},
        {"set": {"train.batch_size": 16}},
    ],
)
def test_a_digest_is_of_the_experiment_and_not_of_names(tmp_path, changes):
    """Titles, names of arms and the paths of caches are not in it; a field that is set to what it was is no change."""
    study = make_study(tmp_path)
    assert digests(replace(study, **changes)) == digests(study)


@pytest.mark.parametrize(
    "changes",
    [
        {"set": {"train.batch_size": 17}},
        {"set": {"data.train.path": "x.csv"}},
        {"full": {"train.batch_size": 17}},
        {"evaluate": ("eval-logits",)},
        {"kept": ("eval-retrieval",)},
        {"curves": ("train/loss",)},
        {"axes": {"loss": {"softmax": {"loss.name": "softmax", "train.steps": 7}, "sigmoid": {"train.steps": 7}}}},
    ],
)
def test_a_changed_experiment_has_other_digests(tmp_path, changes):
    study = make_study(tmp_path)
    assert set(digests(replace(study, **changes))).isdisjoint(digests(study))


def test_another_test_split_changes_the_final_runs_alone(tmp_path):
    study = make_study(tmp_path)
    before, after = digests(study), digests(replace(study, test={"data.val.path": "test2.csv"}))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, False]


def test_seeds_learning_rates_and_stages_have_digests_of_their_own(tmp_path):
    study = make_study(tmp_path)
    runs = [run for arm in study.arms() for run in [*selection_runs(study, arm), *final_runs(study, arm, 0.001)]]
    assert len({run.digest for run in runs}) == len(runs) == 16
    assert {run.seed for run in runs if run.stage == "select"} == {1000}


def test_a_digest_does_not_depend_on_folders_comments_or_the_machine(tmp_path, monkeypatch):
    """Variables are not expanded; the base may lie elsewhere, be called otherwise, and be in another order."""
    before = digests(make_study(tmp_path))
    monkeypatch.setenv("DATA", "/somewhere")
    other = tmp_path / "other"
    other.mkdir()
    lines = ["# a comment", "train: {steps: 6, batch_size: 16}", "cache: {path: x}", "name: renamed"]
    lines += ["data:", "  train:", "    path: ${DATA}/train.csv", "    format: csv", "output_dir: y"]
    (other / "base.yaml").write_text("\n".join(lines))
    monkeypatch.chdir(other)
    assert digests(make_study(other)) == before
    assert digests(make_study(Path())) == before


def test_a_changed_base_is_seen_by_the_same_process(tmp_path):
    """Also if it has the same size; in a notebook, studies run one after the other."""
    before = digests(make_study(tmp_path))
    (tmp_path / "base.yaml").write_text(BASE.replace("steps: 6", "steps: 7"))
    os.utime(tmp_path / "base.yaml", ns=(1, 1))
    assert set(digests(make_study(tmp_path))).isdisjoint(before)
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(UserError, match=r"there is no experiment file .*base.yaml"):
        base_fields(tmp_path / "base.yaml")


def test_dates_are_texts(tmp_path):
    """YAML has them; JSON, of which the digest is, does not."""
    (tmp_path / "base.yaml").write_text(f"{BASE}\neval: {{name: 2024-01-01}}\n")
    assert len(set(digests(make_study(tmp_path)))) == 4


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        ((0.1, 0.3, 0.2), 0.003),
        ((0.3, 0.3, 0.2), 0.001),
        ((0.1, 0.2, None), 0.003),
        ((None, 0.0, None), 0.003),
        ((None, None, -1.0), 0.01),
        ((None, None, None), 0.001),
    ],
    ids=["best", "equal ones: the smallest", "a failed run", "0 is ahead of failed runs", "so is less", "all failed"],
)
def test_the_learning_rate_is_the_best_on_val(tmp_path, values, chosen):
    study = make_study(tmp_path)
    runs = selection_runs(study, study.arms()[0])
    records = [record(run, value) for run, value in zip(runs, values, strict=True)]
    assert choose_learning_rate(study, records) == chosen
    assert choose_learning_rate(study, records[::-1]) == chosen


def test_one_learning_rate_or_none_is_not_chosen(tmp_path):
    for rates, rate in (((0.1,), 0.1), ((), None)):
        study = make_study(tmp_path, learning_rates=rates)
        state = progress(study, [])
        assert (len(state.missing), state.unknown, state.total) == (10, 0, 10)
        assert {run.learning_rate for run in state.missing} == {rate}


def test_what_is_there_and_what_is_missing(tmp_path):
    """Final runs are unknown until all learning rates of their arm have been tried."""
    study = make_study(tmp_path)
    records = all_records(study)
    empty, complete = progress(study, []), progress(study, records)
    assert (len(empty.records), len(empty.missing), empty.unknown, empty.total) == (0, 6, 10, 16)
    assert (len(complete.records), complete.missing, complete.unknown, complete.total) == (16, [], 0, 16)
    assert complete.learning_rates == {"loss-softmax": 0.001, "loss-sigmoid": 0.001}
    some = progress(study, records[:4])
    assert (len(some.records), len(some.missing), some.unknown, some.total) == (4, 7, 5, 16)


def test_a_changed_arm_makes_its_own_records_stale(tmp_path):
    study = make_study(tmp_path)
    records = all_records(study)
    axes = {"loss": {"softmax": {"loss.name": "softmax", "train.steps": 9}, "sigmoid": {}}}
    state = progress(replace(study, axes=axes), records)
    assert (len(state.records), len(state.missing), state.unknown, state.total) == (8, 3, 5, 16)
    assert {r.arm["loss"] for r in state.stale} == {"softmax"}
    assert len(state.stale) == 8


def test_more_seeds_leave_the_earlier_ones_valid(tmp_path):
    study = make_study(tmp_path)
    state = progress(replace(study, seeds=6), all_records(study))
    assert [run.seed for run in state.missing] == [5, 5]
    assert state.stale == []


def test_a_record_is_read_as_it_was_written(tmp_path):
    study = make_study(tmp_path)
    records = [replace(r, curves={"step": [1.0], "train/loss": [None]}) for r in all_records(study)]
    for each in records:
        write_record(tmp_path / "small", each)
    assert sorted(read_records(tmp_path / "small", "small"), key=str) == sorted(records, key=str)
    assert read_records(tmp_path / "none", "small") == []


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other"},
        {"stage": "test"},
        {"seed": "0"},
        {"seed": 1.5},
        {"arm": ["softmax"]},
        {"arm": {"loss": 5}},
        {"learning_rate": "0.001"},
        {"learning_rate": float("nan")},
        {"digest": ["a"]},
        {"digest": None},
        {"results": [1]},
        {"results": {"retrieval/R@10": "0.5"}},
        {"results": {"retrieval/R@10": True}},
        {"results": {"retrieval/R@10": float("nan")}},
        {"results": {"retrieval/R@10": None}},
        {"curves": {"train/loss": 3}},
        {"curves": {"train/loss": ["a"]}},
        {"failed": 1},
        {"seconds": "long"},
        {"hardware": None},
        {"versions": ["torch"]},
        {"versions": {"torch": 2}},
    ],
    ids=str,
)
def test_a_record_edited_by_hand_is_refused_in_one_line(tmp_path, change):
    """It says which file it is, and what to do."""
    study = make_study(tmp_path)
    made = record(final_runs(study, study.arms()[0], 0.001)[0])
    write_record(tmp_path / "small", made)
    (path,) = (tmp_path / "small").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_records(tmp_path / "small", "small")
    assert f"{path} is no record of the study small; restore it, or remove it" in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "it is empty"), ("{", "is damaged, not JSON"), ("[]", "JSON other than an"), ("{}", "no r")],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, content, text):
    (tmp_path / "a.final.s0.json").write_text(content)
    with pytest.raises(UserError, match=text):
        read_records(tmp_path, "small")


def test_a_copy_of_a_record_under_another_name_is_refused(tmp_path):
    """Which of the two counts would depend on their names."""
    study = make_study(tmp_path)
    made = record(final_runs(study, study.arms()[0], 0.001)[0])
    write_record(tmp_path / "small", made)
    path = record_path(tmp_path / "small", made.arm, made.stage, made.learning_rate, made.seed)
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=rf"copy.json holds the record {path.name}; rename it, or remove it"):
        read_records(path.parent, "small")


def test_spikes_are_counted(tmp_path):
    """From its neighbours, whatever the schedule does meanwhile; gaps of a curve are left out."""
    run = final_runs(make_study(tmp_path), {"loss": "sigmoid"}, 0.001)[0]
    ramp = [float(step) for step in range(100)]
    spiked = [*ramp[:40], 2.1 * 41, *ramp[41:50], 1.9 * 50, *ramp[51:70], 500.0, *ramp[71:]]
    made = replace(record(run), curves={"train/norm": [*ramp, None], "spiked": spiked, "short": [1.0, 3.0, 1.0]})
    assert made.measure(["curve/train/norm/spikes"]) == 0
    assert made.measure(["curve/spiked/spikes"]) == 2
    assert made.measure(["curve/short/spikes"]) == 1
    assert made.measure(["curve/none/spikes"]) is None
    assert made.measure(["retrieval/R@10", "retrieval/none"]) is None
