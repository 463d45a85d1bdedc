"""FSDP2: weights, gradients and optimizer state are sharded over the ranks, block by block.

Knows nothing of towers: a block is one of several modules of the same type in a list. A checkpoint is the same file
that training without sharding writes, so a run can be resumed with either.
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
from typing_extensions import override


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the children of a module; its own parameters, which may be scalars, are replicated.

    All ranks take the values of the first one. Parameters become DTensors.

    Args:
        module: of the same structure on all ranks; each child has a forward of its own.
        mesh: the ranks, in one dimension.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        first_rank_values = tensor.detach().to(mesh.device_type).contiguous()
        dist.broadcast(first_rank_values, 0)
        tensor.data.copy_(first_rank_values)
    for child in module.children():
        _shard_blocks(child, mesh)
        if _has_parameters(child):
            # By default the outermost module stays gathered after a forward without a backward, as in validation, and
            # its parameters would then be others than the optimizer's.
            fully_shard(child, mesh=mesh, reshard_after_forward=True)
    for name, own in list(module.named_parameters(recurse=False)):
        copies = distribute_tensor(own.detach(), mesh, [Replicate()])
        module.register_parameter(name, nn.Parameter(copies, requires_grad=own.requires_grad))


def _shard_blocks(tower: nn.Module, mesh: DeviceMesh) -> None:
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    for blocks in reversed(lists):  # the inner ones first, as fully_shard requires
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            for block in blocks:
                if _has_parameters(block) and not isinstance(block, nn.ModuleList):  # a list has no forward
                    fully_shard(block, mesh=mesh)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def unsharded(parameter: torch.Tensor) -> torch.Tensor:
    """Return a replicated parameter as a plain tensor, whose gradient is averaged over the ranks, as in DDP."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")])
    return parameter


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for modules that `shard` themselves, with the checkpoints of every other strategy.

    Lightning's own checkpoints number the optimizer's parameters in the order of the module, not of the optimizer: when
    another strategy reads them, or the other way round, the state goes to the wrong parameters. Lightning also loads
    the weights before the module can refuse the checkpoint.
    """

    def __init__(self, ranks: int):
        """Shard over `ranks` ranks."""
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """True, so that Lightning calls `load_optimizer_state_dict`."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the full weights on the first rank; all ranks call it together."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gather the full state on the first rank; all ranks call it together."""
        return self._gathered(optimizer.state_dict())

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file without loading anything into the module."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of the weights."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the optimizer state."""
        assert self.lightning_module is not None
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named: dict[int, str] = {}
            groups = []
            for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                members = [names[parameter] for parameter in group["params"]]
                named |= zip(saved_group["params"], members, strict=True)
                groups.append({**saved_group, "params": members})
            state = {named[index]: value for index, value in saved["state"].items()}
            full: dict[str, Any] = {"state": state, "param_groups": groups}
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.lightning_module, optimizer, full, options=options)
            for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group |= {**saved_group, "params": group["params"]}  # torch turns pairs such as betas into lists
            _replicate_scalar_state(optimizer)

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gather all DTensors, one after the other, so that a device holds at most one full tensor at a time."""

        def full_on_first_rank(shard: DTensor) -> torch.Tensor | None:
            full = shard.full_tensor()
            return full.cpu() if self.is_global_zero else None

        gathered: dict[str, Any] = tree_map_only(DTensor, full_on_first_rank, state)
        return gathered


def _replicate_scalar_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the loaded state of scalar parameters DTensors again: torch takes all scalars for counters of steps."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor) or parameter.dim() > 0:
            continue
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                device = parameter.device_mesh.device_type
                state[name] = distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements)
