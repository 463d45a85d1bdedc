"""How this process was started, and checks of the devices, machines and batch size of the experiment.

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
from siglit.runtime.text import plural


def is_first_process() -> bool:
    """Tell whether this is the first of all processes of the run, also before Lightning has set up the group."""
    node = int(os.environ.get("NODE_RANK", "0"))  # the only variable that is set where machines are started by hand
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0 and node == 0


def quiet_lightning() -> None:
    """Silence the messages and warnings of libraries that do not matter to a user of siglit."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for harmless in (
        "Experiment logs directory",  # its rows are kept, see siglit.training.metrics_csv
        "Checkpoint directory .* exists and is not empty",
        r"Found \d+ module\(s\) in eval mode",  # a locked model's are so on purpose
        ".*does not have many workers",
        ".*The number of training batches .* is smaller than the logging interval",
        ".*LeafSpec.* is deprecated",
        "Grad strides do not match bucket view strides",  # of the one channel of a depthwise kernel, as in ConvNeXt
        "FSDP2-wrapped module .* returned a view tensor",  # nothing here changes embeddings in place
        # In float16, the gradients of the first steps overflow until the scaler has found its factor; it skips them.
        r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
    ):
        warnings.filterwarnings("ignore", message=harmless)


def check_accelerator(section: str, accelerator: str, devices: int = 1) -> None:
    """Refuse CUDA where there is none, and more devices than there are.

    Args:
        section: "train", "cache" or "eval", whose accelerator and devices these are, for the message.
        accelerator: auto, cpu or cuda.
        devices: of this machine; on the CPU they are processes, of any number.

    Raises:
        UserError: the accelerator is cuda, but the machine has no CUDA device; or it has too few of them.
    """
    available = torch.cuda.is_available()
    if accelerator == "cuda" and not available:
        raise UserError(f"{section}.accelerator is cuda, but this machine has no CUDA device; use cpu or auto")
    if accelerator != "cpu" and available and devices > torch.cuda.device_count():
        raise UserError(
            f"{section}.devices is {devices}, but this machine has {plural(torch.cuda.device_count(), 'CUDA device')}; "
            f"lower {section}.devices, or set {section}.accelerator to cpu"
        )


def choose_device(section: str, accelerator: str) -> torch.device:
    """Return the device of a section's accelerator; auto: CUDA where there is one, else the CPU.

    Raises:
        UserError: the accelerator is cuda, but the machine has no CUDA device.
    """
    check_accelerator(section, accelerator)
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def check_batch_size(train: TrainConfig) -> None:
    """Refuse a global batch that cannot be split evenly over the devices.

    Raises:
        UserError: train.batch_size is not divisible by devices × nodes.
    """
    devices = train.devices * train.nodes
    if train.batch_size % devices:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be shared evenly by {devices} devices; choose a multiple of "
            f"{devices}"
        )


def check_batch_fits(train: TrainConfig, images: int) -> None:
    """Refuse a global batch of more pairs than there are images: an image is in one pair per epoch.

    Args:
        train: the global batch and the devices that share it.
        images: of data.train that have captions.

    Raises:
        UserError: train.batch_size is larger than `images`.
    """
    if train.batch_size <= images:
        return
    devices = train.devices * train.nodes
    largest = images - images % devices
    needed = f"data.train needs at least {plural(devices, 'image')}, one per device"
    raise UserError(
        f"train.batch_size {train.batch_size} is larger than the {plural(images, 'image')} of data.train; "
        + (f"lower it to {largest} or less" if largest > 0 else needed)
    )


def check_launched(field: str, nodes: int) -> None:
    """Refuse several machines where no launcher says which one this is: it would wait for the others in silence.

    Raises:
        UserError: `field` is more than 1, but neither torchrun nor SLURM has started this process.
    """
    if nodes > 1 and "MASTER_ADDR" not in os.environ and not SLURMEnvironment.detect():
        raise UserError(
            f"{field} is {nodes}, but this process was not started by torchrun or SLURM, which connect the machines. "
            f"Start it with torchrun --nnodes {nodes} --nproc-per-node DEVICES --node-rank 0 --master-addr HOST "
            "-m siglit … on the first one, with --node-rank 1 on the next"
        )


def check_slurm_tasks(section: str, devices: int, nodes: int) -> None:
    """Refuse a SLURM job that does not have one task for each device: with too few, the tasks wait for ever.

    Args:
        section: "train" or "cache", whose devices these are, for the message.
        devices: per machine.
        nodes: machines.

    Raises:
        UserError: SLURM has started more or fewer tasks than devices × nodes, or not `devices` on each machine.
    """
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():  # torchrun within a job starts the ranks
        return
    tasks, per_node, machines = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES"))
    placed = per_node == str(devices) or (per_node is None and tasks == "1")
    if placed and tasks == str(devices * nodes) and machines in (None, str(nodes)):
        return
    options = {"--ntasks": tasks, "--ntasks-per-node": per_node, "--nodes": machines}
    actual = " ".join(f"{option} {value}" for option, value in options.items() if value)
    raise UserError(
        f"SLURM has started the job with {actual}, but {section}.devices is {devices} and {section}.nodes {nodes}, and "
        f"each device needs one task; start the job with --nodes {nodes} --ntasks-per-node {devices} (not with "
        f"--ntasks alone), or set {section}.devices and {section}.nodes to match the job"
    )
