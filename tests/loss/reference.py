"""The losses written out naively for one process, whole matrices and plain autograd, in float64."""

import importlib.util
import warnings
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siglit.loss import Negatives, sigmoid_loss

SCALE, BIAS = 7.0, -3.0
EXCHANGES = ("bidir", "shift", "reduce", "gather")
MASKS = {
    "plain": {},
    "ids, drop": {"ids": True},
    "ids, positive": {"ids": True, "ambiguous": "positive"},
    "random": {"negatives": Negatives("random", 2)},
    "hardest": {"negatives": Negatives("hardest", 2)},
    "easiest": {"negatives": Negatives("easiest", 1.5)},
    "random, ids, drop": {"negatives": Negatives("random", 0.8, seed=3), "ids": True},
    "hardest, ids, positive": {"negatives": Negatives("hardest", 1), "ids": True, "ambiguous": "positive"},
    "easiest, ids, drop": {"negatives": Negatives("easiest", 0.5), "ids": True},
}


def batch(n, dim, seed=0):
    """(n, dim) images, (n, dim) texts, unit rows in float64; (2, n) ids of images and texts."""
    generator = torch.Generator().manual_seed(seed)
    zimg, ztxt = (F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=generator)) for _ in range(2))
    return zimg, ztxt, torch.randint(0, max(3, n - 2), (2, n), generator=generator)


def leaves(*values, device="cpu"):
    """Copies on a device that require gradients; numbers become float64 scalars."""
    tensors = (v.detach() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.float64) for v in values)
    return [tensor.to(device, copy=True).requires_grad_() for tensor in tensors]


def on_device(options, device):
    """Arguments of a loss with their tensors on a device."""
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}


def options(mask, ids, rows=slice(None)):
    """Arguments of sigmoid_loss for one of MASKS and these rows of the batch."""
    arguments = dict(MASKS[mask])
    if arguments.pop("ids", False):
        arguments |= {"image_ids": ids[0][rows], "text_ids": ids[1][rows]}
    return arguments


def masks_of(cosines, device="cpu", **options):
    """Which pairs of (n, n) cosines, text by image, sigmoid_loss takes for positives, and which it counts at all.

    With unit vectors as images, a text is its own row of cosines and its gradient shows the grad_logits of each pair.
    """
    (ztxt,) = leaves(cosines, device=device)
    images = torch.eye(len(cosines), dtype=cosines.dtype, device=device)
    sigmoid_loss(images, ztxt, 1.0, 0.0, **on_device(options, device)).backward()
    grad_logits = ztxt.grad.cpu()
    return grad_logits < 0, grad_logits != 0


def labels(cosines, negatives=None, image_ids=None, text_ids=None, ambiguous="drop"):
    """(n, n) bool positive and kept, from the definitions; a random choice is the one that the loss makes."""
    n = len(cosines)
    own = torch.eye(n, dtype=torch.bool)
    same = torch.zeros_like(own)
    for ids in (image_ids, text_ids):
        if ids is not None:
            same |= ids[:, None] == ids
    positive = own | same if ambiguous == "positive" else own
    candidate = ~(own | same)
    if negatives is not None and negatives.keep == "random":
        options = {"image_ids": image_ids, "text_ids": text_ids, "ambiguous": ambiguous}
        candidate = masks_of(cosines, negatives=negatives, **options)[1] & ~positive
    elif negatives is not None:
        order = cosines.detach() if negatives.keep == "hardest" else -cosines.detach()
        order = order.masked_fill(~candidate, -torch.inf).flatten()
        best = order.argsort(descending=True)[: round(negatives.per_positive * n)]
        candidate &= torch.zeros(n * n, dtype=torch.bool).index_fill(0, best, True).view(n, n)
    return positive, positive | candidate


def sigmoid(zimg, ztxt, scale, bias, statistics=None, **options):
    """Equation 1 over all pairs, with masks and ids."""
    cosines = ztxt @ zimg.T
    positive, kept = labels(cosines, **options)
    logits = cosines * scale + bias
    terms = -F.logsigmoid(torch.where(positive, logits, -logits)) * kept
    if statistics is not None:
        negative = kept & ~positive
        statistics.update(
            positives=positive.sum(),
            negatives=negative.sum(),
            positive_logit=logits[positive].mean(),
            negative_logit=logits[negative].mean(),
            positive_share=terms[positive].sum() / terms.sum(),
        )
    return terms.sum() / len(ztxt)


def softmax(zimg, ztxt, scale):
    """Mean of the cross-entropies along rows and columns."""
    logits, own = ztxt @ zimg.T * scale, torch.arange(len(ztxt))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def value_and_gradients(loss, *inputs, device="cpu", **options):
    """[loss, gradient in each input], computed on a device; the inputs become leaves that require them."""
    inputs = leaves(*inputs, device=device)
    value = loss(*inputs, **on_device(options, device))
    results = [value.detach(), *torch.autograd.grad(value, inputs)]
    assert {result.device.type for result in results} == {device}
    return [result.cpu() for result in results]


def assert_equal(actual, expected, tolerance=1e-10):
    """Both are lists of tensors."""
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        text = f"number {number}: "
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, text=text: text + m)


def open_clip_loss():
    """open_clip/loss.py by itself: the package would load all its models."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    # It calls functions that torch has deprecated.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    path = f"{package.submodule_search_locations[0]}/loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MemoryWatch(TorchDispatchMode):
    """Notes what torch does: names of operations, the largest tensor, and the most bytes alive at a time."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.alive, self.peak, self._known = [], 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        inputs = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor.untyped_storage(), inputs)
        return result

    def _count(self, storage, inputs):
        # A finalizer runs when the last tensor is freed, whoever holds it: torch keeps a storage's Python object alive.
        if storage._cdata in self._known or storage.data_ptr() in inputs:
            return
        self._known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage, size):
        self._known.discard(storage)
        self.alive -= size
