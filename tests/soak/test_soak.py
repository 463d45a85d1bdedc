"""`make soak` in small, so that it keeps running: a few kills, and what half a minute allows of the rest."""

import pytest

from tests.soak.__main__ import main


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--part", "kills", "--kills", "4"],
        ["--part", "damage", "--flips", "1", "--minutes", "0.5"],
        ["--part", "disk", "--rounds", "1", "--minutes", "0.5"],
    ],
    ids=lambda words: words[1],
)
def test_a_little_of_everything(words, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main([*words, "--out", str(tmp_path / "soak")]) == 0
    assert "FAILED" not in (tmp_path / "soak.md").read_text()
    assert (tmp_path / "soak.json").exists()
