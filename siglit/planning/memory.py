"""What a training run will hold in memory, counted before it runs: no data, no weights, no device, no arithmetic.

The towers are built without numbers and one training step is walked through on tensors that have shapes only; every
storage is counted from the operation that makes it to the moment it is freed. The loss is left out of the walk and
counted from the sizes of its tiles and rows (docs/loss.md). Knows neither time nor files.
Shapes: b pairs per device, m pairs of a micro-batch, D embedding width, L tokens, W devices.
"""

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siglit.config import Experiment
from siglit.data.epoch_loader import Batch
from siglit.errors import UserError
from siglit.loss.elementwise import compiling
from siglit.loss.tiles import tiles
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.tokenizer import tokenizer_path
from siglit.training.data import TrainDataModule
from siglit.training.module import SigLiT
from siglit.training.optim import parameter_groups, state_bytes

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_WALKED = (32, 64)
"""Sizes of the two walks that a line is drawn through: large enough for every operation to do what it does at scale."""


class Vocabulary:
    """Stands for a tokenizer that is not there yet: only its numbers are asked for."""

    fingerprint = "not trained yet"
    eos_id = pad_id = 1

    def __init__(self, vocab_size: int, length: int):
        """Take the numbers."""
        self.vocab_size, self.length = vocab_size, length


class RandomData(TrainDataModule):
    """Random pairs of the shapes that the experiment trains on, and an image side with random weights."""

    def __init__(self, experiment: Experiment):
        """Look at the architectures; nothing is read but a tokenizer, where there is one."""
        super().__init__(experiment)
        self.tokenizer = tokenizer_or_numbers(experiment)  # type: ignore[assignment]
        self._config = replace(experiment.image_tower, pretrained=False, weights=None)
        with torch.device("meta"):
            tower = ImageTower(self._config)
        self.image_size, self.width = tower.image_size, tower.embedding_width
        self.locked = experiment.mode == "locked"

    def captions(self) -> Iterable[str]:
        """There are none."""
        return ()

    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """As in training, on the default device."""
        tower = None if self.locked else ImageTower(self._config, trainable=True)
        return ImageEncoder(tower, width=self.width, head=self._config.head), {}

    def batch(self, pairs: int) -> Batch:
        """Draw a batch."""
        if self.locked:
            image = torch.randn(pairs, self.width).half()
        else:
            image = torch.randint(0, 256, (pairs, 3, self.image_size, self.image_size), dtype=torch.uint8)
        numbers = torch.arange(pairs)
        ids = torch.randint(0, self.tokenizer.vocab_size, (pairs, self.tokenizer.length))
        return {"image": image, "ids": ids, "rows": numbers, "text_ids": numbers, "image_ids": numbers}

    def prepare_data(self) -> None:
        """Nothing is to be made."""

    def setup(self, stage: str) -> None:
        """Nothing is to be opened."""


@dataclass(frozen=True)
class Lines:
    """Bytes alive after each of a series of operations, each growing with the number of pairs."""

    fixed: np.ndarray
    per_pair: np.ndarray

    def __call__(self, pairs: int) -> int:
        """At most, for so many pairs."""
        return round(float((self.fixed + self.per_pair * pairs).max()))


@dataclass(frozen=True)
class Walk:
    """Bytes of a tower's work in one step, beside weights, gradients, optimiser and batch."""

    kept: Lines
    """Between forward and backward: what backward will need, embeddings included."""
    forward: Lines
    backward: Lines

    def most(self, pairs: int) -> int:
        """At most in both."""
        return max(self.forward(pairs), self.backward(pairs))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device."""

    parameters: dict[str, int]
    """Parameters of each tower; a locked image tower has none here."""
    weights: int
    gradients: int
    optimizer: int
    """Its state."""
    largest: int
    """Of the largest parameter."""
    batch: int
    """A batch of b pairs."""
    pairs: int
    """Per device b."""
    dim: int
    loss_tiles: int
    """While the loss is computed."""
    loss_rows: int
    """Until backward has begun."""
    image: Walk
    text: Walk

    def kept(self, pairs: int) -> int:
        """Bytes that both towers keep for backward after a pass of so many pairs."""
        return self.image.kept(pairs) + self.text.kept(pairs)

    def activations(self, micro_batch_size: int | None) -> int:
        """Bytes kept for backward at once; micro-batches keep those of one part of one tower."""
        if micro_batch_size is None or micro_batch_size >= self.pairs:
            return self.kept(self.pairs)
        return max(self.image.kept(micro_batch_size), self.text.kept(micro_batch_size))

    def peak(self, micro_batch_size: int | None) -> int:
        """Most bytes of a training step, without the allocator's waste and what the device keeps for itself."""
        if micro_batch_size is None or micro_batch_size >= self.pairs:
            images, kept = self.image.kept(self.pairs), self.kept(self.pairs)
            forward = max(self.image.forward(self.pairs), images + self.text.forward(self.pairs))
            # What is made last is worked off first.
            backward = max(images + self.text.backward(self.pairs), self.image.backward(self.pairs))
        else:
            # Embeddings of both sides: of each part, of all, and as unit rows. Backward makes one part again at a time,
            # but for the last one of the texts, which is there from forward on.
            kept = 2 * 3 * 4 * self.pairs * self.dim
            forward = backward = kept + max(self.image.most(micro_batch_size), self.text.most(micro_batch_size))
            kept += self.text.kept(micro_batch_size)
        loss = kept + self.loss_tiles + self.loss_rows
        # An optimiser works parameter by parameter, with a few temporary copies.
        work = max(forward, loss, backward + self.loss_rows, 2 * self.largest)
        return self.weights + self.gradients + self.optimizer + self.batch + work

    def largest_micro_batch(self, budget: float) -> int | None:
        """Pairs per pass that fit into so many bytes: b, else a power of two, or None if nothing fits."""
        if self.peak(None) <= budget:
            return self.pairs
        sizes = (2**power for power in range(int(math.log2(self.pairs)), -1, -1) if 2**power < self.pairs)
        return next((size for size in sizes if self.peak(size) <= budget), None)


def estimate_memory(experiment: Experiment, *, device: str, precision: str) -> MemoryEstimate:
    """Count what one of the experiment's devices will hold.

    Args:
        experiment: train.devices and train.nodes share the batch; with fsdp2 they share the weights too.
        device: "cpu" or "cuda": decides the tiles of the loss.
        precision: Lightning's.

    Raises:
        UserError: an architecture is unknown, or its fields do not fit each other.
    """
    experiment = replace(experiment, train=replace(experiment.train, compile=False))
    data = RandomData(experiment)
    module = build(experiment, data)
    ranks = experiment.train.devices * experiment.train.nodes
    pairs = experiment.train.batch_size // ranks
    sharers = ranks if experiment.train.strategy == "fsdp2" else 1
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = parameter_groups(module, experiment.optim, {})
    trained_images = any(p.requires_grad for p in module.image_tower.parameters())
    rows, tile = _loss_bytes(experiment, module.image_tower.dim, device, precision, trained_images)
    return MemoryEstimate(
        parameters={
            "image tower": sum(p.numel() for p in module.image_tower.parameters()),
            "text tower": sum(p.numel() for p in module.text_tower.parameters()),
        },
        weights=sum(p.nbytes for p in module.parameters()) // sharers,
        gradients=sum(p.nbytes for p in trained) // sharers,
        optimizer=state_bytes(groups, experiment.optim) // sharers,
        largest=max(p.nbytes for p in trained),
        batch=sum(t.nbytes for t in data.batch(1).values()) * pairs,  # type: ignore[attr-defined]
        pairs=pairs,
        dim=module.image_tower.dim,
        loss_tiles=tile,
        loss_rows=rows,
        image=_walk(experiment, data, precision, "image"),
        text=_walk(experiment, data, precision, "text"),
    )


def build(experiment: Experiment, data: RandomData) -> SigLiT:
    """The training module without numbers: its parameters have shapes and types only."""
    with torch.device("meta"):
        module = SigLiT(experiment, 1)
        module.build(data)
    return module


def tokenizer_or_numbers(experiment: Experiment) -> Tokenizer | Vocabulary:
    """The run's tokenizer, or what is known of the one that training will make."""
    try:
        path = tokenizer_path(experiment.folder, experiment.tokenizer, experiment.text_tower.pretrained)
        return load_tokenizer(path, experiment.tokenizer)
    except UserError:
        return Vocabulary(experiment.tokenizer.vocab_size, experiment.tokenizer.length)


def _loss_bytes(experiment: Experiment, dim: int, device: str, precision: str, trained_images: bool) -> tuple[int, int]:
    """Rows and tiles of the loss, see "What it costs" in docs/loss.md."""
    ranks = experiment.train.devices * experiment.train.nodes
    pairs = experiment.train.batch_size // ranks
    narrow = precision == "bf16-mixed"
    size = 2 if narrow else 4
    visiting = {"bidir": 4, "shift": 2, "reduce": 2, "gather": ranks}[experiment.loss.exchange] if ranks > 1 else 0
    earning = 0
    if trained_images:
        earning = 1 if ranks == 1 else ranks if experiment.loss.exchange == "gather" else 3
    rows = pairs * dim * (2 * size * narrow + visiting * size + 4 + 4 * earning)
    compiled = compiling(pairs * pairs * ranks)
    down, across = next(tiles(pairs, pairs, experiment.loss.chunk_size, torch.device(device), compiled))
    area = (down.stop - down.start) * (across.stop - across.start)
    # Cosines, losses, slopes and slopes × cosines; compiled, slopes take the cosines' place if their type is the same.
    return rows, area * ((6 if narrow else 4) if compiled else 16)


def _walk(experiment: Experiment, data: RandomData, precision: str, side: Literal["image", "text"]) -> Walk:
    """Walk through forward and backward of one tower at two sizes."""
    few, many = (_bytes_of_step(experiment, data, precision, side, pairs) for pairs in _WALKED)
    lines = []
    for a, b in zip(few, many, strict=True):
        assert len(a) == len(b), "the step did other operations for another number of pairs"
        per_pair = (np.array(b) - np.array(a)) / (_WALKED[1] - _WALKED[0])
        lines.append(Lines(np.array(a) - per_pair * _WALKED[0], per_pair))
    return Walk(*lines)


def _bytes_of_step(
    experiment: Experiment, data: RandomData, precision: str, side: Literal["image", "text"], pairs: int
) -> tuple[list[int], list[int], list[int]]:
    """Bytes kept between forward and backward, and after each operation of both."""
    module = build(experiment, data)
    dtype = _AUTOCAST.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_numbers(module)
        batch = data.batch(pairs)
        tower, inputs = (module.image_tower, batch["image"]) if side == "image" else (module.text_tower, batch["ids"])
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        with _Alive([*tower.parameters(), *tower.buffers(), *gradients, inputs]) as alive:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                rows = F.normalize(tower(inputs).float(), dim=1)
            kept, forward, alive.told = alive.now, alive.told, [0]
            if rows.requires_grad:
                rows.backward(torch.ones_like(rows))
    return [kept], forward, alive.told


def _without_numbers(module: nn.Module) -> None:
    """Exchange meta tensors for fake ones, which pass for the CPU's: attention then takes the kernel it would take."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        fake.grad = torch.empty_like(fake) if tensor.requires_grad else None
                    made[tensor] = fake
                table[name] = made[tensor]  # type: ignore[assignment]


class _Alive(TorchDispatchMode):
    """Counts bytes of storages made within it for as long as anything holds them."""

    def __init__(self, given: list[torch.Tensor]):
        """Leave the storages of `given` out."""
        super().__init__()
        self.now = 0
        self.told: list[int] = []
        self._given = [tensor.untyped_storage() for tensor in given]
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf.untyped_storage())
        self.told.append(self.now)
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._part_with, storage._cdata, storage.nbytes())

    def _part_with(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size
