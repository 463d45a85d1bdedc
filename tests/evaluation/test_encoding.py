"""Captions become unit rows in their order, each distinct one passing the tower once."""

import numpy as np
import pytest
import torch

from siglit.evaluation.encoding import encode_ids, unit_rows

CPU = torch.device("cpu")


class CountingTower:
    """Linear in the ids; keeps its inputs."""

    def __init__(self, device=CPU):
        self.weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
        self.batches = []

    def __call__(self, ids):
        assert ids.dtype == torch.int64
        self.batches.append(ids.clone())
        return (ids.float() + 1) @ self.weight


def repeated_ids(dtype=np.uint16):
    distinct = np.arange(44, dtype=dtype).reshape(11, 4)
    return distinct, distinct[np.random.default_rng(0).integers(0, 11, 50)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_equal_captions_share_one_pass(batch_size, dtype):
    distinct, ids = repeated_ids(dtype)
    tower = CountingTower()
    encode_ids(tower, ids, batch_size=batch_size, device=CPU, quiet=True)
    rows = torch.cat(tower.batches)
    assert len(rows) == len(np.unique(ids, axis=0)) < len(ids)
    assert (
        {tuple(r) for r in rows.tolist()} == {tuple(r) for r in ids.tolist()} <= {tuple(r) for r in distinct.tolist()}
    )
    assert max(len(block) for block in tower.batches) <= batch_size


def test_rows_are_units_in_the_captions_order(device):
    _, ids = repeated_ids()
    actual = encode_ids(CountingTower(device), ids, batch_size=3, device=torch.device(device), quiet=True)
    raw = CountingTower()(torch.from_numpy(ids.astype(np.int64))).numpy()
    assert actual.dtype == np.float32
    assert actual == pytest.approx(raw / np.linalg.norm(raw, axis=1, keepdims=True), abs=1e-6)


def test_no_gradient_is_recorded():
    def tower(ids):
        assert torch.is_inference_mode_enabled()
        return ids.float()

    encode_ids(tower, np.ones((2, 3), np.int32), batch_size=2, device=CPU, quiet=True)


def test_float16_tower_outputs_become_float32_units():
    """Squares of such rows overflow float16: the norm is taken in float32."""
    rows = (np.random.default_rng(0).standard_normal((5, 9)) * 3e3).astype(np.float16)
    actual = unit_rows(rows)
    wide = rows.astype(np.float64)
    assert actual.dtype == np.float32
    assert actual == pytest.approx(wide / np.linalg.norm(wide, axis=1, keepdims=True), abs=1e-6)
