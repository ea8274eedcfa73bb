"""Replaces the CUDA extension of peft's BOFT, which supports only one factor without it."""

import torch


class BlockDiagonal:
    """The extension's two functions, for blocks (M, N, S, S)."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The block diagonal matrices, (M, N S, N S)."""
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, gradients: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of the blocks."""
        M, N, S, _ = blocks.shape
        return [gradients.view(M, N, S, N, S).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)]
