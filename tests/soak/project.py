"""The project that is disturbed: pictures, a tiny tower, caches and a run, as the tests have them."""

import contextlib
import json
import shutil

import siglit
from tests import conftest
from tests.soak.damage import FILLING, RESUME
from tests.soak.processes import Running


def make_place(place):
    """Fill a folder with a project and its caches."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(conftest.TOWER["model"], num_classes=10, **conftest.TOWER["model_args"])
    save_file(model.state_dict(), place / "tower.safetensors")
    conftest.make_project(place, place / "tower.safetensors")
    for name in ("train.csv", "val.csv"):
        head, *lines = (place / name).read_text().splitlines()
        labelled = [f"{line},{int(line[7:11]) % len(conftest.COLORS)}" for line in lines]
        (place / name).write_text("\n".join([f"{head},color", *labelled]) + "\n")
    text = (place / "experiment.yaml").read_text()
    (place / "experiment.yaml").write_text(text.replace(".csv}", ".csv, label_column: color}"))
    (place / "colors.json").write_text(json.dumps(list(conftest.COLORS)))
    with contextlib.chdir(place):
        siglit.precompute(conftest.parse("precompute"))
    return place


class _PowerCutError(RuntimeError):
    pass


def make_damage_place(place, folder):
    """Fill a folder with a project, a run that was cut off in step 7 of 8, and what every command leaves."""
    from siglit.training.module import SigLiT

    (folder / "logs").mkdir(parents=True)
    for name in ("train.csv", "val.csv", "experiment.yaml", "colors.json"):
        shutil.copy(place / name, folder / name)
    (folder / "images").symlink_to(place / "images")
    for name in ("cache", "runs"):
        shutil.copytree(place / name, folder / name)
    real = SigLiT.training_step

    def cut_off(module, batch, number):
        if module.trainer.global_step == 6:
            raise _PowerCutError
        return real(module, batch, number)

    SigLiT.training_step = cut_off
    try:
        with contextlib.chdir(folder), contextlib.suppress(_PowerCutError):
            siglit.train(conftest.parse("train", *RESUME[4:]))
    finally:
        SigLiT.training_step = real
    for words in FILLING:
        run = Running(words, folder, folder / "logs")
        assert run.wait(120) == 0, f"{words}: {run.err}"
    shutil.rmtree(folder / "logs")
    return folder
