"""A global batch is at most the data, wherever it is checked, and the message gives the largest that works."""

import re

import pytest

from siglit.config import TrainConfig
from siglit.errors import UserError
from siglit.runs.launch import check_batch_fits


@pytest.mark.parametrize(
    ("train", "images", "advice"),
    [
        (TrainConfig(batch_size=401), 400, "lower it to 400 or less"),
        (TrainConfig(batch_size=512, devices=4, nodes=4), 410, "lower it to 400 or less"),
        (TrainConfig(batch_size=16, devices=8), 7, "data.train needs at least 8 images, one per device"),
    ],
)
def test_a_batch_larger_than_the_data_is_refused(train, images, advice):
    expected = f"train.batch_size {train.batch_size} is larger than the {images} images of data.train; {advice}"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        check_batch_fits(train, images)


def test_a_batch_as_large_as_the_data_is_taken():
    check_batch_fits(TrainConfig(batch_size=400), 400)
