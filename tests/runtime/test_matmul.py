"""Settings of torch that a block changes are the caller's again afterwards, whichever way they were set."""

import pytest
import torch

from siglit.runtime.matmul import matmul_precision


def settings():
    """All that says how float32 is multiplied; a setting that torch refuses to read counts as such."""
    backends = torch.backends
    readers = (
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.allow_tf32,
        *(
            lambda b=b: b.fp32_precision
            for b in (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        ),
    )
    read = []
    for reader in readers:
        try:
            read.append(reader())
        except RuntimeError:
            read.append("refused")
    return read


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("earlier", ["default", "high", "no TF32 in cuDNN", "TF32 of one backend"])
def test_a_block_has_its_precision_and_leaves_the_callers(earlier, precision):
    if earlier == "high":
        torch.set_float32_matmul_precision("high")
    elif earlier == "no TF32 in cuDNN":
        torch.backends.cudnn.allow_tf32 = False
    elif earlier == "TF32 of one backend":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = settings()
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (precision == "high")
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if precision == "high" else "ieee")
    # What torch refused to read before, it may tell afterwards.
    assert [now for now, then in zip(settings(), before, strict=True) if then != "refused"] == [
        then for then in before if then != "refused"
    ]
