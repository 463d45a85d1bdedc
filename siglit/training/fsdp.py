"""FSDP2: weights, gradients and the optimiser's state shared out among the ranks, block by block.

Knows a block as one of several equal modules in a list, not towers. A checkpoint is the file that training without
sharding writes, so a run can go on either way.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the children of a module; its own parameters, which may be scalars, are on every rank.

    All ranks go on with the first one's values. Parameters become DTensors.

    Args:
        module: the same on all ranks, each child with a forward of its own.
        mesh: the ranks, in one dimension.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        of_first = tensor.detach().to(mesh.device_type).contiguous()
        dist.broadcast(of_first, 0)
        tensor.data.copy_(of_first)
    for child in module.children():
        _shard_blocks(child, mesh)
        if _has_parameters(child):
            # By itself the outermost module stays whole after a forward without a backward, as in validation, and
            # whoever looks at the parameters then would find other ones than the optimiser's.
            fully_shard(child, mesh=mesh, reshard_after_forward=True)
    for name, own in list(module.named_parameters(recurse=False)):
        copies = distribute_tensor(own.detach(), mesh, [Replicate()])
        module.register_parameter(name, nn.Parameter(copies, requires_grad=own.requires_grad))


def _shard_blocks(tower: nn.Module, mesh: DeviceMesh) -> None:
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    for blocks in reversed(lists):  # the inner ones first, as fully_shard wants it
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            for block in blocks:
                if _has_parameters(block) and not isinstance(block, nn.ModuleList):  # a list has no forward
                    fully_shard(block, mesh=mesh)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def unsharded(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter that is on every rank as a plain tensor; its gradient is the mean of the ranks', as in DDP."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")])
    return parameter


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for modules that `shard` themselves, with the checkpoints of any other strategy.

    Lightning's own number the optimiser's parameters as the module has them, not as the optimiser does: read by
    another strategy, or the other way round, the state would go to the wrong parameters. They are also loaded before
    the module can refuse them.
    """

    def __init__(self, ranks: int):
        """Share everything out among so many ranks."""
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Have `load_optimizer_state_dict` called."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full weights on the first rank; all ranks together."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Full state on the first rank; all ranks together."""
        return self._whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, and no more."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of the weights."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the state."""
        assert self.lightning_module is not None
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named: dict[int, str] = {}
            groups = []
            for group, of_saved in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                members = [names[parameter] for parameter in group["params"]]
                named |= zip(of_saved["params"], members, strict=True)
                groups.append({**of_saved, "params": members})
            state = {named[number]: value for number, value in saved["state"].items()}
            whole: dict[str, Any] = {"state": state, "param_groups": groups}
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.lightning_module, optimizer, whole, options=options)
            for group, of_saved in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group |= {**of_saved, "params": group["params"]}  # torch has made lists of pairs

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gather all DTensors, one after the other, so that no device holds more than one of them whole."""

        def whole(part: DTensor) -> torch.Tensor | None:
            full = part.full_tensor()
            return full.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = tree_map_only(DTensor, whole, state)
        return gathered
