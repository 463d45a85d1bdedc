"""Study files: what is refused, in one line that names it; arms, selectors and the fields of each arm."""

from pathlib import Path

import pytest
import yaml

from siglit.errors import UserError
from siglit.studies.definition import matches, slug
from siglit.studies.grid import final_runs, selection_runs
from siglit.studies.running import load_run
from siglit.studies.study_file import EVALUATIONS, read_study
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
REMOVED = object()


def make_values(**changes):
    """A study file as plain data, with some parts changed."""
    values = {
        "name": "small",
        "title": "Losses over batches",
        "claim": "One loss is ahead.",
        "source": "this project",
        "base": "base.yaml",
        "axes": {
            "loss": {"softmax": {"loss.name": "softmax"}, "sigmoid": {}},
            "batch": {64: {"train.batch_size": 64}, 512: {"train.batch_size": 512}},
        },
        "measures": {"R@10": ["retrieval/image_to_text/R@10", "retrieval/text_to_image/R@10"]},
        "expect": [{"say": "ahead", "plus": [{"loss": "sigmoid"}], "minus": [{"loss": "softmax"}], "measure": "R@10"}],
    }
    return {name: value for name, value in (values | changes).items() if value is not REMOVED}


def read(folder, as_full=False, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(make_values(**changes), sort_keys=False))
    return read_study(path, full=as_full)


def expectation(**changes):
    return [{**make_values()["expect"][0], **changes}]


def test_arms_are_crossed_in_the_order_of_the_file(tmp_path):
    """A number as the name of a point is a text from then on, as in selectors."""
    study = read(tmp_path, exclude=[{"loss": "softmax", "batch": 512}])
    assert study.arms() == [
        {"loss": "softmax", "batch": "64"},
        {"loss": "sigmoid", "batch": "64"},
        {"loss": "sigmoid", "batch": "512"},
    ]
    assert slug(study.arms()[0]) == "loss-softmax.batch-64"
    assert matches({"loss": "softmax", "batch": "64"}, {"batch": "64"})
    assert not matches({"loss": "softmax"}, {"batch": "64"})


def test_what_is_left_out_has_a_default(tmp_path):
    study = read(tmp_path)
    assert (study.seeds, study.learning_rates, study.evaluate, study.kept) == (5, (), ("eval-retrieval",), ())
    assert study.expect[0].margin == 0.0
    assert selection_runs(study, study.arms()[0]) == []


def test_an_arm_has_the_fields_of_its_points_over_those_of_all(tmp_path):
    """Likewise its test split; `base` and `test` of a point are no fields; the last point's base counts."""
    point = {"base": "other.yaml", "test": {"eval.name": "own"}, "train.steps": 9}
    study = read(
        tmp_path,
        set={"train.steps": 3, "optim.lr": 0.1},
        test={"eval.name": "test", "data.val.fold": "9/10"},
        axes={"loss": {"softmax": {"loss.name": "softmax"}, "sigmoid": point}},
    )
    plain, changed = study.arms()
    assert study.fields_of(plain) == {"train.steps": 3, "optim.lr": 0.1, "loss.name": "softmax"}
    assert study.fields_of(changed) == {"train.steps": 9, "optim.lr": 0.1}
    assert study.test_of(plain) == {"eval.name": "test", "data.val.fold": "9/10"}
    assert study.test_of(changed) == {"eval.name": "own", "data.val.fold": "9/10"}
    assert (study.base_of(plain), study.base_of(changed)) == (tmp_path / "base.yaml", tmp_path / "other.yaml")


def test_full_is_over_all_other_fields_and_has_a_name_of_its_own(tmp_path):
    full = {"train.batch_size": 4096}
    short, long = read(tmp_path, full=full), read_study(tmp_path / "study.yaml", full=True)
    assert (short.name, long.name) == ("small", "small-full")
    assert short.fields_of(short.arms()[0])["train.batch_size"] == 64
    assert long.fields_of(long.arms()[0])["train.batch_size"] == 4096


def test_numbers_that_yaml_takes_for_texts(tmp_path):
    """1e-3 without a point is a text in YAML 1.1."""
    assert read(tmp_path, learning_rates=["1e-3", 0.01]).learning_rates == (0.001, 0.01)
    assert read(tmp_path, expect=expectation(margin="-1e-2")).expect[0].margin == -0.01


REFUSED = {
    "no name": ({"name": REMOVED}, "name is missing; a study has name, title"),
    "an empty base": ({"base": ""}, "base is missing"),
    "no axes": ({"axes": {}}, "axes is missing"),
    "no expectations": ({"expect": []}, "expect is missing"),
    "an unknown key": ({"seed": 5}, "seed is not a part of the study file; did you mean seeds?"),
    "a name with a slash": ({"name": "../x"}, "name is '../x', but it must be letters, digits, _ and -"),
    "a number as a name": ({"name": 7}, "name is 7, but it must be a text"),
    "a list as a title": ({"title": ["a"]}, "title is ['a'], but it must be a text"),
    "no mapping": ({"axes": ["a"]}, "axes is ['a'], but it must be a mapping"),
    "an axis of nothing": ({"axes": {"loss": None}}, "axes.loss is None, but it must be a mapping"),
    "an empty axis": ({"axes": {"loss": {}}}, "axes.loss has no points"),
    "a point of nothing": ({"axes": {"loss": {"a": None}}}, "axes.loss.a is None, but it must be a mapping"),
    "a point that is a number": ({"axes": {"batch": {"64": 64}}}, "axes.batch.64 is 64, but it must be a mapping"),
    "an unknown field": ({"axes": {"loss": {"a": {"loss.nam": "x"}}}}, "axes.loss.a sets loss.nam, which is not a fi"),
    "a section": ({"set": {"loss": {"name": "softmax"}}}, "set sets loss, which is not a field"),
    "a field of the study": ({"set": {"seed": 3}}, "set sets seed, which the study sets itself"),
    "a folder": ({"test": {"output_dir": "x"}}, "test sets output_dir, which the study sets itself"),
    "a field with mixed names": (
        {"set": {"image_tower.model_args": {1: 2, "a": 3}}},
        "set.image_tower.model_args has names of several types",
    ),
    "a number as a base": ({"axes": {"loss": {"a": {"base": 5}}}}, "axes.loss.a.base is 5, but it must be a text"),
    "a list as a test": ({"axes": {"loss": {"a": {"test": []}}}}, "axes.loss.a.test is [], but it must be a mapping"),
    "two arms of one name": ({"axes": {"loss": {"a b": {}, "a/b": {}}}}, "two arms would have records of the same na"),
    "two names that are one text": (
        {"axes": {"batch": {True: {}, "True": {}}}},
        "axes.batch has two names that are the",
    ),
    "a long name": ({"axes": {"loss": {"a" * 300: {}}}}, "is too long for the name of a file; shorten axes or points"),
    "too many arms": (
        {"axes": {str(i): {str(k): {} for k in range(9)} for i in range(9)}},
        "cross to 387,420,489 arms",
    ),
    "no arm left": ({"exclude": [{}]}, "exclude leaves out all arms"),
    "an exclusion of nothing": (
        {"exclude": [{"batch": 65}]},
        "exclude: no arm has {'batch': '65'}; the axes are loss: s",
    ),
    "an exclusion that is no list": ({"exclude": {"batch": 64}}, "exclude is {'batch': 64}, but it must be a list"),
    "four seeds": ({"seeds": 4}, "seeds is 4, but it must be a whole number from 5"),
    "a yes as seeds": ({"seeds": True}, "seeds is True, but it must be a whole number"),
    "a rate that is no number": ({"learning_rates": ["high"]}, "learning_rates is 'high', but it must be a number"),
    "a rate that is a yes": ({"learning_rates": [True]}, "learning_rates is True, but it must be a number"),
    "a rate that is infinite": ({"learning_rates": [float("inf")]}, "learning_rates is inf, but it must be a number"),
    "one rate": ({"learning_rates": 0.1}, "learning_rates is 0.1, but it must be a list"),
    "a rate twice": ({"learning_rates": [0.1, "1e-1"]}, "learning_rates has a value twice"),
    "two rates of one record": (
        {"learning_rates": [0.1, 0.10000001]},
        "learning_rates has a value twice, in six digits",
    ),
    "a rate and rates": ({"set": {"optim.lr": 0.1}, "learning_rates": [0.1]}, "optim.lr is set, but learning_rates ch"),
    "an unknown evaluation": ({"evaluate": ["retrieval"]}, "evaluate has 'retrieval', but it must be eval-retrieval,"),
    "an unknown kept evaluation": ({"kept": ["eval-probe"]}, "kept has 'eval-probe', but it must be"),
    "a measure without paths": ({"measures": {"R@10": []}}, "measures.R@10 has no paths of results"),
    "a measure of a number": ({"measures": {"R@10": [3]}}, "measures.R@10 is 3, but it must be a text"),
    "an expectation of no measure": (
        {"expect": expectation(measure="R@11")},
        "R@11 is not one of the measures; they are",
    ),
    "an expectation of no arm": (
        {"expect": expectation(plus=[{"loss": "x"}])},
        "expect 'ahead': no arm has {'loss': 'x'}",
    ),
    "an expectation of no axis": (
        {"expect": expectation(plus=[{"los": "x"}])},
        "expect 'ahead': no arm has {'los': 'x'}",
    ),
    "an expectation of nothing": ({"expect": expectation(plus=[], minus=[])}, "'ahead' has neither arms in plus nor"),
    "an expectation without words": ({"expect": [{"plus": []}]}, "an expectation has no say: {'plus': []}"),
    "an expectation of a word": ({"expect": ["ahead"]}, "expect is 'ahead', but it must be a mapping"),
    "an unknown part of it": (
        {"expect": expectation(marign=1)},
        "marign is not a part of an expectation; did you mean ma",
    ),
    "a margin that is no number": (
        {"expect": expectation(margin=float("nan"))},
        "margin is nan, but it must be a number",
    ),
    "a table that is not there": ({"paper": {"table": "none.csv"}}, "none.csv, which is no file"),
    "an unknown part of the paper": ({"paper": {"tabel": "x"}}, "tabel is not a part of paper; did you mean table?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, case):
    changes, text = REFUSED[case]
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert text in str(error.value)
    assert str(tmp_path / "study.yaml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a mapping of names to values, so it is no study file"),
        (b"- a\n", "is not a mapping"),
        (b"a: [\n", "is not YAML"),
        (b"a: \xff", "is not UTF-8 at byte 3"),
        (b"name: a\nname: b\n", "name is given twice"),
        (b"name: !!python/object/apply:os.getcwd []\n", "is not accepted"),
        (b"name: &a [*a]\n", "a value contains itself"),
    ],
)
def test_a_file_that_is_no_study_is_refused_in_one_line(tmp_path, content, text):
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_study(path)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_has_no_full_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no study file .*none.yaml"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="it has no `full`, the fields of a longer form for GPUs"):
        read(tmp_path, as_full=True)


def test_there_are_twelve_studies():
    assert len(FILES) == 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_studies_of_this_project_are_complete(path):
    """A study's name is its file's; each expectation has a measure that its evaluations can give."""
    study = read_study(path)
    assert study.name == path.stem
    kinds = {command.removeprefix("eval-") for command in EVALUATIONS if command in study.evaluate}
    for paths in study.measures.values():
        assert {path.partition("/")[0] for path in paths} <= kinds | {"train", "curve"}
    assert all(column in study.curves for paths in study.measures.values() for column in curves_of(paths))
    names = [run.folder for arm in study.arms() for run in [*selection_runs(study, arm), *final_runs(study, arm, 0.1)]]
    assert len(names) == len(set(names))


def curves_of(paths):
    return [path.removeprefix("curve/").rpartition("/")[0] for path in paths if path.startswith("curve/")]


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_of_the_studies_is_an_experiment(path, monkeypatch, tmp_path):
    """So are the evaluation of its test split, and its longer form."""
    monkeypatch.setenv("SIGLIT_DATA", str(tmp_path))
    study = read_study(path)
    for arm in study.arms():
        run = final_runs(study, arm, 1e-3)[0]
        experiment, evaluated = load_run(run, tmp_path), load_run(run, tmp_path, test=True)
        assert experiment.optim.lr == 1e-3
        assert experiment.data.val is not None
        if "eval-zeroshot" in study.evaluate:
            assert evaluated.eval.classes is not None
        if experiment.mode == "locked":
            assert evaluated.cache.path != experiment.cache.path
        assert evaluated.data.val != experiment.data.val
        if len(study.kept) > 0:
            assert experiment.train.keep_every > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if "\nfull:" in path.read_text()], ids=lambda path: path.stem)
def test_every_arm_of_the_longer_forms_is_an_experiment(path, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGLIT_DATA", str(tmp_path))
    study = read_study(path, full=True)
    for arm in study.arms():
        experiment = load_run(final_runs(study, arm, 1e-3)[0], Path(tmp_path))
        assert experiment.text_tower.width == 768, "that of `full`"
