"""Memory of a training run, counted before it starts: without data, weights, device or arithmetic.

The towers are built on the meta device and one training step of each runs on fake tensors, which have shapes and no
values. Every storage is counted from the operation that allocates it until it is freed. The loss is counted by
`loss.memory_bytes`. Proposes the largest micro-batch that fits; what training uses is train.micro_batch_size alone.
Knows neither time nor files.
Shapes: b pairs per device, m pairs of a micro-batch, D embedding width, L tokens, W devices.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from siglit.config import Experiment, LossConfig
from siglit.data.epoch_loader import Batch
from siglit.errors import UserError
from siglit.loss import LossMemory, memory_bytes
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.tokenizer import tokenizer_path
from siglit.runtime.torch_internals import storage_id
from siglit.training.data import TrainDataModule
from siglit.training.module import SigLiT
from siglit.training.optim import parameter_groups, state_bytes

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SAMPLED_PAIRS = (32, 64)
"""Sizes of the two steps that a line is drawn through: large enough to run the same operations as a full batch."""


class TokenizerPlaceholder:
    """What the towers need to know of a tokenizer that is not trained yet."""

    fingerprint = "not trained yet"
    eos_id = pad_id = 1

    def __init__(self, vocab_size: int, length: int):
        """Take the vocabulary size and the number of tokens L."""
        self.vocab_size, self.length = vocab_size, length


class RandomDataModule(TrainDataModule):
    """Random pairs of the shapes that the experiment trains on, and an image encoder with random weights."""

    def __init__(self, experiment: Experiment):
        """Read the shapes off the architectures; the only file that is read is the tokenizer, if there is one."""
        super().__init__(experiment)
        self.tokenizer = tokenizer_or_placeholder(experiment)  # type: ignore[assignment]
        self._config = replace(experiment.image_tower, pretrained=False, weights=None)
        with torch.device("meta"):
            tower = ImageTower(self._config)
        self.image_size, self.width = tower.image_size, tower.embedding_width
        self.locked = experiment.mode == "locked"

    @override
    def captions(self) -> Iterable[str]:
        return ()

    @override
    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        tower = None if self.locked else ImageTower(self._config, trainable=True)
        return ImageEncoder(tower, width=self.width, head=self._config.head), {}

    def batch(self, pairs: int) -> Batch:
        """Draw a batch of this many pairs."""
        if self.locked:
            image = torch.randn(pairs, self.width).half()
        else:
            image = torch.randint(0, 256, (pairs, 3, self.image_size, self.image_size), dtype=torch.uint8)
        indices = torch.arange(pairs)
        ids = torch.randint(0, self.tokenizer.vocab_size, (pairs, self.tokenizer.length))
        return {"image": image, "ids": ids, "rows": indices, "text_ids": indices, "image_ids": indices}

    @override
    def prepare_data(self) -> None:
        """Skip training a tokenizer."""

    @override
    def setup(self, stage: str) -> None:
        """Open nothing."""


@dataclass(frozen=True)
class BytesByPairs:
    """Live bytes after each of a series of operations, each linear in the number of pairs."""

    fixed: np.ndarray
    per_pair: np.ndarray

    def peak(self, pairs: int) -> int:
        """Return the most bytes alive at once with this many pairs."""
        return round(float((self.fixed + self.per_pair * pairs).max()))


@dataclass(frozen=True)
class TowerMemory:
    """Bytes that one step of a tower allocates: besides weights, gradients, optimizer state and batch."""

    saved: BytesByPairs
    """Between forward and backward: what backward needs, embeddings included."""
    forward: BytesByPairs
    backward: BytesByPairs

    def peak(self, pairs: int) -> int:
        """Return the most bytes alive at once in forward and backward."""
        return max(self.forward.peak(pairs), self.backward.peak(pairs))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device."""

    parameters: dict[str, int]
    """Number of parameters of each tower; a locked image tower has none here."""
    weights: int
    gradients: int
    optimizer: int
    """The optimizer's state."""
    largest_parameter: int
    batch: int
    """A batch of b pairs."""
    batch_per_pair: int
    pairs: int
    """Pairs per device, b."""
    dim: int
    loss: LossMemory
    """Rows live until backward has begun, the tile during the loss."""
    loss_memory: Callable[[LossConfig, int], LossMemory]
    """That of another loss and number of pairs."""
    image: TowerMemory
    text: TowerMemory

    def saved(self, pairs: int) -> int:
        """Return the bytes that both towers save for backward after a pass of this many pairs."""
        return self.image.saved.peak(pairs) + self.text.saved.peak(pairs)

    def activations(self, micro_batch_size: int | None) -> int:
        """Return the bytes saved for backward at once: with micro-batches, of one part of one tower."""
        if micro_batch_size is None or micro_batch_size >= self.pairs:
            return self.saved(self.pairs)
        return max(self.image.saved.peak(micro_batch_size), self.text.saved.peak(micro_batch_size))

    def peak(self, micro_batch_size: int | None) -> int:
        """Return the most bytes alive in a training step, without fragmentation and what the device itself reserves."""
        return sum(self.parts(micro_batch_size).values())

    def parts(self, micro_batch_size: int | None) -> dict[str, int]:
        """Return the bytes alive at the moment of a training step when they are the most, by what they are for."""
        pairs, rows = self.pairs, self.loss.rows
        if micro_batch_size is None or micro_batch_size >= pairs:
            embeddings, images, saved = 0, self.image.saved.peak(pairs), self.saved(pairs)
            forward = max(self.image.forward.peak(pairs), images + self.text.forward.peak(pairs))
            # Backward runs through the texts first, as they were encoded last.
            backward = max(images + self.text.backward.peak(pairs), self.image.backward.peak(pairs))
        else:
            # Embeddings of both sides: of each part, of all, and as unit rows. Backward recomputes one part at a time,
            # except the last one of the texts, whose activations are still there from forward.
            embeddings, saved = 2 * 3 * 4 * pairs * self.dim, self.text.saved.peak(micro_batch_size)
            forward = backward = max(self.image.peak(micro_batch_size), self.text.peak(micro_batch_size))
        moments = (
            {"activations": forward, "embeddings": embeddings},
            {"activations": saved, "embeddings": embeddings, "loss": self.loss.tile + rows},
            {"activations": backward, "embeddings": embeddings, "loss": rows},
            # An optimizer updates one parameter after another, with a few temporary copies.
            {"optimizer step": 2 * self.largest_parameter},
        )
        work = max(moments, key=lambda moment: sum(moment.values()))
        state = {"weights": self.weights, "gradients": self.gradients, "optimizer state": self.optimizer}
        return {**state, "batch": self.batch, **work}

    def with_pairs(self, pairs: int, loss: LossConfig) -> "MemoryEstimate":
        """Return the estimate for another number of pairs per device, and for another loss."""
        return replace(self, pairs=pairs, batch=self.batch_per_pair * pairs, loss=self.loss_memory(loss, pairs))

    def largest_micro_batch(self, budget: float) -> int | None:
        """Return the largest micro-batch that fits into `budget` bytes: b, else a power of two; None if 1 does not."""
        if self.peak(None) <= budget:
            return self.pairs
        sizes = (2**power for power in range(int(math.log2(self.pairs)), -1, -1) if 2**power < self.pairs)
        return next((size for size in sizes if self.peak(size) <= budget), None)


def estimate_memory(
    experiment: Experiment, *, device: str, precision: str, world_size: int | None = None
) -> MemoryEstimate:
    """Count what one of the experiment's devices holds in training.

    Args:
        experiment: what is trained.
        device: "cpu" or "cuda": decides the tiles of the loss.
        precision: Lightning's.
        world_size: devices that share the batch and, with fsdp2, the weights; default: train.devices × train.nodes.

    Raises:
        UserError: an architecture is unknown, or its fields contradict each other.
    """
    train = experiment.train
    ranks = world_size or train.devices * train.nodes
    data = RandomDataModule(experiment)
    module = build_on_meta(experiment, data)
    pairs, dim = train.batch_size // ranks, module.image_tower.dim
    sharers = ranks if train.strategy == "fsdp2" else 1
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = parameter_groups(module, experiment.optim, {})
    batch_per_pair = sum(t.nbytes for t in data.batch(1).values())  # type: ignore[attr-defined]
    loss_memory = partial(
        _loss_memory,
        dim=dim,
        world_size=ranks,
        image_gradient=any(p.requires_grad for p in module.image_tower.parameters()),
        device=device,
        precision=precision,
    )
    return MemoryEstimate(
        parameters={
            "image tower": sum(p.numel() for p in module.image_tower.parameters()),
            "text tower": sum(p.numel() for p in module.text_tower.parameters()),
        },
        weights=sum(p.nbytes for p in module.parameters()) // sharers,
        gradients=sum(p.nbytes for p in trained) // sharers,
        optimizer=state_bytes(groups, experiment.optim) // sharers,
        largest_parameter=max(p.nbytes for p in trained),
        batch=batch_per_pair * pairs,
        batch_per_pair=batch_per_pair,
        pairs=pairs,
        dim=dim,
        loss=loss_memory(experiment.loss, pairs),
        loss_memory=loss_memory,
        image=_tower_memory(experiment, data, precision, "image"),
        text=_tower_memory(experiment, data, precision, "text"),
    )


def build_on_meta(experiment: Experiment, data: RandomDataModule) -> SigLiT:
    """Build the training module on the meta device: its parameters have shapes and types, but no values."""
    with torch.device("meta"):
        module = SigLiT(experiment, 1)
        module.build(data)
    return module


def tokenizer_or_placeholder(experiment: Experiment) -> Tokenizer | TokenizerPlaceholder:
    """Load the run's tokenizer; a placeholder if it is not trained yet."""
    try:
        path = tokenizer_path(experiment.folder, experiment.tokenizer, experiment.text_tower.pretrained)
        return load_tokenizer(path, experiment.tokenizer)
    except UserError:
        return TokenizerPlaceholder(experiment.tokenizer.vocab_size, experiment.tokenizer.length)


def _loss_memory(
    config: LossConfig, pairs: int, dim: int, *, world_size: int, image_gradient: bool, device: str, precision: str
) -> LossMemory:
    """Return what the loss holds, with the copies of the embeddings that mixed precision converts to 16 bits for it."""
    dtype = _AUTOCAST.get(precision, torch.float32)
    memory = memory_bytes(
        pairs,
        dim,
        world_size=world_size,
        exchange=config.exchange,
        dtype=dtype,
        image_gradient=image_gradient,
        selected=config.negatives != "all" or config.ambiguous != "negative",
        chunk_size=config.chunk_size,
        device=device,
    )
    copies = 2 * pairs * dim * dtype.itemsize if dtype != torch.float32 else 0
    if config.name == "softmax":
        # A log sum for each image of the global batch, as it is sent and as it arrives; logits besides the cosines.
        copies += 2 * world_size * pairs * torch.float32.itemsize
        return LossMemory(rows=memory.rows + copies, tile=memory.tile * 5 // 4)
    return replace(memory, rows=memory.rows + copies)


def _tower_memory(
    experiment: Experiment, data: RandomDataModule, precision: str, side: Literal["image", "text"]
) -> TowerMemory:
    """Run forward and backward of one tower with two numbers of pairs and interpolate linearly."""
    few, many = (_live_bytes_of_step(experiment, data, precision, side, pairs) for pairs in _SAMPLED_PAIRS)
    lines = []
    for a, b in zip(few, many, strict=True):
        assert len(a) == len(b), "the step ran other operations with another number of pairs"
        per_pair = (np.array(b) - np.array(a)) / (_SAMPLED_PAIRS[1] - _SAMPLED_PAIRS[0])
        lines.append(BytesByPairs(np.array(a) - per_pair * _SAMPLED_PAIRS[0], per_pair))
    return TowerMemory(*lines)


def _live_bytes_of_step(
    experiment: Experiment, data: RandomDataModule, precision: str, side: Literal["image", "text"], pairs: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the bytes alive between forward and backward, after each operation of forward, and of backward."""
    module = build_on_meta(experiment, data)
    dtype = _AUTOCAST.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_meta_by_fake(module)
        batch = data.batch(pairs)
        tower, inputs = (module.image_tower, batch["image"]) if side == "image" else (module.text_tower, batch["ids"])
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        with _LiveBytes([*tower.parameters(), *tower.buffers(), *gradients, inputs]) as live:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                # Not a call of the tower, which would compile it with train.compile.
                rows = F.normalize(tower.forward(inputs).float(), dim=1)
            saved, forward, live.history = live.now, live.history, [0]
            if rows.requires_grad:
                rows.backward(torch.ones_like(rows))
    return [saved], forward, live.history


def _replace_meta_by_fake(module: nn.Module) -> None:
    """Replace meta tensors by fake ones that claim to be on the CPU, for which attention chooses the CPU's kernel."""
    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        fake.grad = torch.empty_like(fake) if tensor.requires_grad else None
                    fakes[tensor] = fake
                table[name] = fakes[tensor]  # type: ignore[assignment]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are allocated within it, for as long as they are referenced."""

    def __init__(self, excluded: list[torch.Tensor]):
        """Leave out the storages of `excluded`."""
        super().__init__()
        self.now = 0
        self.history: list[int] = []
        """Bytes alive after each operation."""
        self._excluded = [tensor.untyped_storage() for tensor in excluded]
        self._known = {storage_id(storage) for storage in self._excluded}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.history.append(self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage_id(storage) in self._known:
            return
        self._known.add(storage_id(storage))
        self.now += storage.nbytes()
        weakref.finalize(storage, self._release, storage_id(storage), storage.nbytes())

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
