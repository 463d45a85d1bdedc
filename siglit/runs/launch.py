"""How this process was started, and whether the devices and machines that are asked for are there.

Knows Lightning's environments; computes nothing.
"""

import logging
import os
import warnings

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from siglit.config import TrainConfig
from siglit.errors import UserError


def is_first_process() -> bool:
    """Tell whether this is the first of all processes of the run, also before Lightning has set up the group."""
    node = int(os.environ.get("NODE_RANK", "0"))  # all that is set where machines are started by hand
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0 and node == 0


def quiet_lightning() -> None:
    """Silence what Lightning says of itself; what matters of a run is said by its stage."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for harmless in (
        "Experiment logs directory",  # its rows are kept, see siglit.training
        "Checkpoint directory .* exists and is not empty",
        r"Found \d+ module\(s\) in eval mode",  # a locked model's, on purpose
        ".*does not have many workers",
        ".*The number of training batches .* is smaller than the logging interval",
        ".*LeafSpec.* is deprecated",
        "Grad strides do not match bucket view strides",  # of the one channel of a depthwise kernel, as in ConvNeXt
        "FSDP2-wrapped module .* returned a view tensor",  # nothing here changes embeddings in place
    ):
        warnings.filterwarnings("ignore", message=harmless)


def check_accelerator(field: str, accelerator: str) -> None:
    """Refuse CUDA where there is none.

    Raises:
        UserError: `field` asks for it in vain.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{field} is cuda, but this machine has no CUDA device; use cpu or auto")


def choose_device(field: str, accelerator: str) -> torch.device:
    """Return the device that `accelerator` means here; auto: CUDA where there is one.

    Raises:
        UserError: `field` asks for CUDA in vain.
    """
    check_accelerator(field, accelerator)
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def check_batch_size(train: TrainConfig) -> None:
    """Refuse a global batch that cannot be cut into equal parts.

    Raises:
        UserError: it cannot.
    """
    devices = train.devices * train.nodes
    if train.batch_size % devices:
        raise UserError(f"train.batch_size {train.batch_size} cannot be shared evenly by {devices} devices")


def check_batch_fits(train: TrainConfig, images: int) -> None:
    """Refuse a global batch of more pairs than there are images: an image gives one pair per pass.

    Args:
        train: the batch and the devices that share it.
        images: in one pass over data.train.

    Raises:
        UserError: train.batch_size is larger than the data.
    """
    if train.batch_size <= images:
        return
    devices = train.devices * train.nodes
    largest = images - images % devices
    advice = f"lower it to {largest} or less" if largest else f"{devices} devices need at least {devices} images"
    raise UserError(f"train.batch_size {train.batch_size} is larger than the {images} images of data.train; {advice}")


def check_launched(field: str, nodes: int) -> None:
    """Refuse several machines where nobody says which one this is: it would wait for the others, in silence.

    Raises:
        UserError: `field` asks for several, and neither torchrun nor SLURM has started this process.
    """
    if nodes > 1 and "MASTER_ADDR" not in os.environ and not SLURMEnvironment.detect():
        raise UserError(
            f"{field} is {nodes}, but this process was not started by torchrun or SLURM, which tell the machines of "
            f"each other: torchrun --nnodes {nodes} --nproc-per-node DEVICES --node-rank 0 --master-addr HOST "
            "-m siglit … on the first one, with --node-rank 1 on the next"
        )


def check_slurm_tasks(section: str, devices: int, nodes: int) -> None:
    """Refuse a job of SLURM that has not one task for each device: those that are too few wait for ever.

    Args:
        section: "train" or "cache", whose devices these are, for the message.
        devices: per machine.
        nodes: machines.

    Raises:
        UserError: SLURM has started this process as one of more, fewer or otherwise placed tasks.
    """
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():  # within a job, torchrun starts the ranks
        return
    tasks, per_node, machines = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES"))
    placed = per_node == str(devices) or (per_node is None and tasks == "1")
    if placed and tasks == str(devices * nodes) and machines in (None, str(nodes)):
        return
    asked = {"--ntasks": tasks, "--ntasks-per-node": per_node, "--nodes": machines}
    raise UserError(
        f"SLURM has started {' '.join(f'{option} {value}' for option, value in asked.items() if value)}, but "
        f"{section}.devices is {devices} and {section}.nodes {nodes}, and each device needs one task: start the job "
        f"with --nodes {nodes} --ntasks-per-node {devices} (not with --ntasks alone), or set {section}.devices and "
        f"{section}.nodes to what SLURM gives"
    )
