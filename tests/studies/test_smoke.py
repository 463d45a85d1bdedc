"""Every study of this project at toy size."""

import pytest

import siglit
from siglit.studies.records import read_records
from siglit.studies.smoke import smoke_study
from siglit.studies.study_file import read_study
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_toy_study_reads_no_data_of_its_own(path, tmp_path, monkeypatch):
    """It needs no variable and no download, takes a few steps, and keeps what the study is about."""
    monkeypatch.setattr("siglit.studies.smoke._draw", lambda *_: None)
    study = read_study(path)
    toy = smoke_study(study, tmp_path)
    assert toy.arms() == study.arms()
    for arm in toy.arms():
        fields = toy.fields_of(arm)
        assert not any("${" in str(value) for value in fields.values())
        assert fields["train.steps"] <= 2
        assert fields["train.batch_size"] <= 16
        about = ("loss.", "optim.name", "optim.betas", "optim.decay", "data.corrupt", "mode", "image_tower.center")
        for name, value in study.fields_of(arm).items():
            assert not name.startswith(about) or fields[name] == value


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_works_at_toy_size(path, tmp_path, monkeypatch):
    """All arms are trained and evaluated, no run fails, and each measure has a value (the softmax loss has no ECE)."""
    monkeypatch.delenv("SIGLIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    study = read_study(path)
    done = siglit.study_run(str(path), smoke=True, work=str(tmp_path))
    print(done)
    assert done.complete == done.total == len(study.arms())
    records = read_records(tmp_path / f"{study.name}-smoke" / "data" / study.name, study.name)
    assert [record.failed for record in records if record.failed is not None] == []
    for name, paths in study.measures.items():
        assert any(record.measure(paths) is not None for record in records), name
