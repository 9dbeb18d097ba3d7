"""Attention behind one signature.

Shapes: B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, not causal.

    Args:
        q, k, v: (B, N, H, D); strided views are fine.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        (B, N, H, D), by PyTorch's fused kernel for the device.
    """
    out_bhnd = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout
    )
    return out_bhnd.transpose(1, 2)
