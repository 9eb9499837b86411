"""Model FLOPs, counted from a decoder's structure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mosaicjax.models.decoder import Decoder
from mosaicjax.spec import Param


@dataclass(frozen=True)
class Flops:
    """What one target token of a row costs, forward and backward, without recomputation.

    `causal` counts the scores that causality and windows leave, `full` all L x L of them, as most published
    figures do. A multiply-add is two FLOPs; a backward pass is twice its forward. Norms, nonlinearities and
    softmax are not counted; nor is the embedding lookup.

    Units: FLOPs a target token.
    """

    causal: float
    full: float


def per_token(decoder: Decoder, length: int) -> Flops:
    """FLOPs a token of rows of `length`.

    Source: PaLM, arXiv 2204.02311, appendix B, with attention counted twice.
    """
    dims = decoder.dims
    weights = sum(
        _products(param, dims) for name, param in decoder.spec().items() if not _looked_up(name, decoder)
    )
    causal = full = 0.0
    for _, _, block, layers in decoder.blocks():
        per_score = 2 * 2 * dims["heads"] * dims["head_dim"]
        full += layers.count * per_score * length
        causal += layers.count * per_score * mean_seen(length, block.attention.window)
    return Flops(3.0 * (2 * weights + causal), 3.0 * (2 * weights + full))


def mean_seen(length: int, window: int) -> float:
    """How many keys a query sees on average in a row of `length`, itself included (window 0: none)."""
    reach = min(window or length, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _products(param: Param, dims: object) -> int:
    """Multiply-adds a token of a weight: its entries where it is a matrix, none where it scales or shifts."""
    matrix = len(param.axes) > 1 and "embed" in param.axes
    return math.prod(param.shape(dims)) if matrix else 0  # type: ignore[arg-type]


def _looked_up(name: str, decoder: Decoder) -> bool:
    return name == "embed/positions" or (name == "embed/tokens" and not decoder.tied)
