"""The text tower: transformers' SigLIP text model from random weights, in the sizes of the field.

Knows nothing of images but the width of their embeddings. Shapes: N captions, L tokens, D embedding width.
Source: big_vision's text transformer; the layers, last-token pooling and head are `transformers.SiglipTextModel`'s.
"""

import torch
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel

from siglit.config import TextTowerConfig
from siglit.errors import UserError

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
    """Token ids in, embeddings of the image tower's width out."""

    def __init__(self, config: TextTowerConfig, *, vocab_size: int, length: int, eos_id: int, pad_id: int, dim: int):
        """Build the tower with random weights.

        Args:
            config: size preset and overrides.
            vocab_size: rows of the token embedding.
            length: tokens per caption L; captions are always padded to it.
            eos_id: end-of-sentence id of the tokenizer.
            pad_id: padding id of the tokenizer.
            dim: width of the output D, that of the image embeddings.

        Raises:
            UserError: the width cannot be divided among the heads.
        """
        super().__init__()
        width, depth, heads = PRESETS[config.size]
        width, depth, heads = config.width or width, config.depth or depth, config.heads or heads
        if width % heads:
            raise UserError(f"a text tower of width {width} cannot have {heads} heads: {width} / {heads} is not whole")
        self.model = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=config.mlp_width or 4 * width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                max_position_embeddings=length,
                projection_size=dim,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
                bos_token_id=None,
            )
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed (N, L) token ids as (N, D), not normalised; no mask, as padding is part of the text for this model."""
        return self.model(input_ids=ids).pooler_output
