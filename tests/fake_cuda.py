"""Tensors on "cuda" without values, for machines that have no GPU: torch's FakeTensorMode.

A traced call shows the type, shape and device of every result. It raises where tensors of two devices meet, and where
Python reads a value: a read, on a GPU, waits for all that was started before. What autograd's engine does in a backward
pass cannot be traced, because it asks the driver for the device. Knows nothing of siglit.
"""

from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostTensors(TorchDispatchMode):
    """Notes the operations that read or make a tensor in the host's memory; copies from there make CUDA wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.names.append(str(function))
        return result


@contextmanager
def traced():
    """Trace the block; the value is the HostTensors of it."""
    with FakeTensorMode(), HostTensors() as host:
        yield host


def to_fake_cuda(module):
    """Give a module parameters and buffers on "cuda"; for use in a traced block."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)
    return module


def _like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@contextmanager
def autocast(monkeypatch, dtype):
    """Autocast of "cuda", which torch otherwise refuses where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with torch.autocast("cuda", dtype):
        yield
    monkeypatch.undo()
