"""The sigmoid loss as a drop-in replacement of open_clip's module.

Shapes: B pairs per rank, D embedding width.
"""

import torch
from torch import nn
from typing_extensions import override

from siglit.loss.exchange import EXCHANGES, Exchange, world
from siglit.loss.sigmoid import sigmoid_loss


class SigLipLoss(nn.Module):
    """The sigmoid loss with the interface, values and gradients of `open_clip.loss.SigLipLoss`.

    As in open_clip, each rank compares its images with all texts: its value is the mean over its images.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: Exchange | None = None,
        chunk_size: int | None = None,
    ):
        """Take open_clip's arguments.

        Args:
            cache_labels: has no effect, as in open_clip; no label matrix is built.
            rank: rank of this process; must be that of the process group.
            world_size: number of processes; 1: the loss of this process alone, even in a larger group.
            dist_impl: how texts travel; None: "bidir".
            chunk_size: see `sigmoid_loss`.

        Raises:
            ValueError: `dist_impl` is not one of the exchanges.
        """
        super().__init__()
        if dist_impl is not None and dist_impl not in EXCHANGES:
            raise ValueError(f"dist_impl is {dist_impl!r}, it must be one of {', '.join(EXCHANGES)}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl: Exchange = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> torch.Tensor:
        """Return (num_logits, num_logits) labels: −1, and +1 on the diagonal unless `negative_only`."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return all (I, T) logits at once."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    @override
    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the loss of this rank's (B, D) images; as {"contrastive_loss": loss} if `output_dict`.

        Raises:
            ValueError: `world_size` differs from the size of the process group, or as `sigmoid_loss`.
        """
        ranks = world()[0]
        if self.world_size > 1 and self.world_size != ranks:
            raise ValueError(f"world_size is {self.world_size}, but the process group has {ranks} ranks")
        loss = sigmoid_loss(
            text_features,
            image_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            exchange=self.dist_impl if self.world_size > 1 else None,
            chunk_size=self.chunk_size,
        )
        return {"contrastive_loss": loss} if output_dict else loss
