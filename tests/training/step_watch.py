"""What a training step makes the host wait for: values that it reads from tensors, and calls to the other ranks.

On a CPU nothing waits, but the same calls would wait on CUDA: so they are noted by their names.
"""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siglit.training.checkpointing import CheckpointSaver
from siglit.training.lightning_internals import is_logged_step
from siglit.training.module import SigLiT

READING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique", "repeat_interleave")
"""Operations of which CUDA must tell the host a value or a size."""
READING_METHODS = ("tolist", "numpy", "cpu")
"""Methods that read a tensor of a CPU without an operation."""
COLLECTIVES = (
    *("all_gather_single", "all_gather_into_tensor", "all_gather", "all_gather_object", "all_reduce", "barrier"),
    *("batch_isend_irecv", "broadcast", "broadcast_object_list", "reduce", "reduce_scatter", "all_to_all_single"),
)


class StepWatch(TorchDispatchMode):
    """Notes (step, name) of each of them in unlogged steps, from the forward pass to the last callback.

    Attributes:
        noted: in order.
        steps: numbers of the unlogged steps.
    """

    def __init__(self, patch=setattr):
        """Take a function like setattr, or that of a monkeypatch."""
        super().__init__()
        self.noted, self.steps, self._step, self._counters = [], [], None, set()
        self._wrap_hooks(patch)
        for owner, names in ((torch.Tensor, READING_METHODS), (dist, COLLECTIVES)):
            for name in names:
                if hasattr(owner, name):
                    patch(owner, name, self._noting(name, getattr(owner, name)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        reads = name in READING_OPS or (name in ("index", "index_put_") and _has_mask(args[1:]))
        if reads and args[0].data_ptr() not in self._counters:
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _note(self, name):
        if self._step is not None:
            self.noted.append((self._step, name))

    def _noting(self, name, real):
        def call(*args, **kwargs):
            self._note(name)
            return real(*args, **kwargs)

        return call

    def _wrap_hooks(self, patch):
        start, end = SigLiT.on_train_batch_start, CheckpointSaver.on_train_batch_end

        def begin(module, batch, number):
            start(module, batch, number)
            self._step = None if is_logged_step(module.trainer) else module.trainer.global_step + 1
            if self._step is not None:
                self.steps.append(self._step)
                # Optimizers keep the number of a parameter's steps on the CPU, where reading it waits for nothing.
                states = module.optimizers(use_pl_optimizer=False).state.values()
                self._counters = {state["step"].data_ptr() for state in states if "step" in state}
                self.__enter__()

        def finish(callback, trainer, *rest):
            end(callback, trainer, *rest)
            if self._step is not None:
                self._step = None
                self.__exit__(None, None, None)

        patch(SigLiT, "on_train_batch_start", begin)
        patch(CheckpointSaver, "on_train_batch_end", finish)


def _has_mask(args):
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args))
