"""The text tower: transformers' SigLIP text model from random weights, or a pretrained text model with a new head.

Knows nothing of images but the width of their embeddings.
Shapes: N captions, L tokens, D embedding width, W hidden width; of the token embedding: V ids, K bottleneck width.
Source: big_vision's text transformer; the layers, last-token pooling and head are `transformers.SiglipTextModel`'s.
"""

from typing import Any

import torch
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel
from typing_extensions import override

from siglit.config import TextTowerConfig
from siglit.errors import UserError
from siglit.models.pretrained_text import (
    architecture_of,
    check_text_model,
    load_text_model,
    pool,
    rebuild_text_model,
    text_mask,
)
from siglit.models.unused import freeze_unused, graph_only

# width, depth, heads; `L12` is the Large width with 12 layers of arXiv:2303.15343, section 4.4.
PRESETS = {
    "micro": (128, 3, 4),
    "S": (384, 12, 6),
    "M": (512, 12, 8),
    "B": (768, 12, 12),
    "L12": (1024, 12, 16),
    "L": (1024, 24, 16),
}


class TextTower(nn.Module):
    """Token ids in, embeddings as wide as the image tower's out."""

    pretrained: frozenset[str]
    """Names of the parameters that came from pretrained weights; the head is never one of them."""
    unused: list[str]
    """Names of the parameters of the pretrained model that the forward never uses; they are frozen."""
    summary: str | None
    """One line to log before training: what a bottleneck saves, or which pretrained model this is."""
    architecture: dict[str, Any] | None
    """The pretrained model in JSON's types, to rebuild the tower without the model's folder; None: random weights."""

    def __init__(
        self,
        config: TextTowerConfig,
        *,
        vocab_size: int,
        length: int,
        eos_id: int,
        pad_id: int,
        dim: int,
        architecture: dict[str, Any] | None = None,
    ):
        """Build the tower with random weights, or a pretrained model with a head of random weights.

        Args:
            config: size preset and overrides, or the pretrained model.
            vocab_size: number of ids of the tokenizer.
            length: tokens per caption, L; captions are always padded to it.
            eos_id: end-of-sentence id of the tokenizer.
            pad_id: padding id of the tokenizer.
            dim: width of the output, D, equal to that of the image embeddings.
            architecture: attribute `architecture` of an earlier tower; the pretrained model is then rebuilt from it
                with random weights, and nothing is loaded.

        Raises:
            UserError: the width is not divisible by the heads, fields contradict each other, or the pretrained model
                cannot be loaded or does not fit the tokenizer.
        """
        super().__init__()
        check_sizes(config)
        self._pooling, self._locked = config.pooling, config.locked
        self._special = {"eos_id": eos_id, "pad_id": pad_id}
        self.model: nn.Module
        if config.pretrained is None:
            self.model = _random_model(
                config, vocab_size=vocab_size, length=length, projection_size=dim, eos_id=eos_id, pad_id=pad_id
            )
            self.head: nn.Linear | None = None  # the random model has its own
            self.architecture, self.pretrained, self.unused = None, frozenset(), []
            self.summary = _bottleneck_summary(self.model, vocab_size)
        else:
            width = self._take_pretrained(config, config.pretrained, vocab_size, length, architecture)
            self.head = _head(width, dim)
            self.summary = _pretrained_summary(config, self.model, width, dim)
        self.train()

    def _take_pretrained(
        self, config: TextTowerConfig, name: str, vocab_size: int, length: int, architecture: dict[str, Any] | None
    ) -> int:
        """Load or rebuild the pretrained model, and return its hidden width W."""
        # The default device may be another one; transformers would need the package accelerate to load there.
        with torch.device("cpu"):
            model = load_text_model(name) if architecture is None else rebuild_text_model(architecture)
            width = check_text_model(model, name, vocab_size=vocab_size, length=length)
            self.model = model.requires_grad_(not config.locked)
            unused = freeze_unused(model, self._sample(vocab_size, length))
        self.architecture = architecture_of(model)
        self.pretrained = frozenset(f"model.{each}" for each, _ in model.named_parameters())
        self.unused = [f"model.{each}" for each in unused]
        return width

    @override
    def train(self, mode: bool = True) -> "TextTower":
        """Set training mode; a locked model stays in evaluation mode, so without dropout."""
        super().train(mode)
        if self._locked:
            self.model.eval()
        return self

    @override
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed (N, L) token ids as (N, D), not normalized.

        A random tower reads padding as part of the text; a pretrained model gets a mask that hides it.
        """
        if self.head is None:
            return self.model(input_ids=ids).pooler_output
        # Autograd stores nothing of a locked model, as none of its parameters requires a gradient.
        return self.head(self._pooled(ids))

    def _pooled(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, W) pooled states of a pretrained model."""
        mask = text_mask(ids, **self._special)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(states, mask, self._pooling)

    def _sample(self, vocab_size: int, length: int) -> torch.Tensor:
        """(2, W) pooled states of a full and a short caption; autograd keeps the graph but no activations."""
        ids = torch.arange(2 * length).view(2, length) % vocab_size
        ids[1, length // 2 :] = self._special["pad_id"]
        with graph_only():
            return self._pooled(ids)


def _random_model(
    config: TextTowerConfig, *, vocab_size: int, length: int, projection_size: int, eos_id: int, pad_id: int
) -> nn.Module:
    width, depth, heads = PRESETS[config.size]
    width, depth, heads = config.width or width, config.depth or depth, config.heads or heads
    model = SiglipTextModel(
        SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=config.mlp_width or 4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=length,
            projection_size=projection_size,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            bos_token_id=None,
        )
    )
    if config.embedding_width is not None:
        model.embeddings.token_embedding = _bottleneck(vocab_size, config.embedding_width, width)
    return model


def _bottleneck(vocab_size: int, narrow: int, width: int) -> nn.Sequential:
    """Token embedding V × K followed by a linear map K × W without a bias (arXiv:2303.15343, section 4.3).

    Each matrix is initialized like an embedding of its own output width, so that their product has the variance 1 / W
    of a plain embedding table (the one of flax and transformers).
    """
    table, up = nn.Embedding(vocab_size, narrow), nn.Linear(narrow, width, bias=False)
    nn.init.normal_(table.weight, std=narrow**-0.5)
    nn.init.normal_(up.weight, std=width**-0.5)
    return nn.Sequential(table, up)


def _bottleneck_summary(model: Any, vocab_size: int) -> str | None:
    embedding = model.embeddings.token_embedding
    if isinstance(embedding, nn.Embedding):
        return None
    width, narrow = embedding[1].weight.shape
    count = vocab_size * narrow + narrow * width
    return (
        f"token embedding {vocab_size:,} × {narrow:,} + {narrow:,} × {width:,} = {_millions(count)} parameters "
        f"instead of {_millions(vocab_size * width)}"
    )


def _pretrained_summary(config: TextTowerConfig, model: nn.Module, width: int, dim: int) -> str:
    count = sum(p.numel() for p in model.parameters())
    return (
        f"text tower {config.pretrained}: {type(model).__name__}, {_millions(count)} parameters, "
        f"{'locked' if config.locked else 'unlocked'}, {config.pooling} pooling, new head {width:,} × {dim:,}"
    )


def _head(width: int, dim: int) -> nn.Linear:
    """Linear map with a bias, initialized like the head of big_vision's text towers, including its pretrained BERT."""
    head = nn.Linear(width, dim)
    nn.init.normal_(head.weight, std=width**-0.5)
    nn.init.zeros_(head.bias)
    return head


def check_sizes(config: TextTowerConfig) -> None:
    """Check the fields against each other; needs no tokenizer, so that none is trained for a tower that cannot be.

    Raises:
        UserError: the width is not divisible by the heads, or fields of random and of pretrained weights are mixed.
    """
    if config.pretrained is None:
        if config.locked:
            raise UserError("text_tower.locked is set, but random weights must be trained; set text_tower.pretrained")
        width, _, heads = PRESETS[config.size]
        width, heads = config.width or width, config.heads or heads
        if width % heads:
            raise UserError(
                f"text_tower.width {width} is not divisible by text_tower.heads {heads}; change one of them"
            )
        return
    for name in ("width", "depth", "heads", "mlp_width", "embedding_width"):
        value = getattr(config, name)
        if value is not None:
            raise UserError(
                f"text_tower.{name} is {value}, but text_tower.pretrained {config.pretrained!r} has its own; "
                "remove one of the two"
            )


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"
