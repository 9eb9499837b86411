"""Model FLOPs, counted from a decoder's structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mosaicjax.models.decoder import Decoder, Remat
from mosaicjax.models.model import Model
from mosaicjax.spec import Param

QKV_WEIGHTS = ("attention/query", "attention/key", "attention/value")


@dataclass(frozen=True)
class Flops:
    """What one target token of a row costs, forward and backward, without recomputation.

    `causal` counts the scores that causality and windows leave, `full` all L x L of them, as most published
    figures do. A multiply-add is two FLOPs; a backward pass is twice its forward. Norms, nonlinearities and
    softmax are not counted; nor is the embedding lookup. Of experts those are counted that a token takes.

    Units: FLOPs a target token.
    """

    causal: float
    full: float


def per_token(decoder: Model, length: int) -> Flops:
    """FLOPs a token of rows of `length`.

    Of a module of one's own it is 6 for each number in a weight that is decayed, which its matrices are.

    Source: PaLM, arXiv 2204.02311, appendix B, with attention counted twice.
    """
    dims = decoder.dims
    if not isinstance(decoder, Decoder):
        entries = sum(math.prod(param.shape(dims)) for _, param in decoder.spec().items() if param.decay)
        return Flops(6.0 * entries, 6.0 * entries)
    weights = sum(
        _products(param, dims) * _met(name, param, decoder)
        for name, param in decoder.spec().items()
        if not _looked_up(name, decoder)
    )
    causal = full = 0.0
    for _, _, block, layers in decoder.blocks():
        per_score = 2 * 2 * dims["heads"] * dims["head_dim"]
        full += layers.count * per_score * length
        causal += layers.count * per_score * mean_seen(length, block.attention.window)
    return Flops(3.0 * (2 * weights + causal), 3.0 * (2 * weights + full))


def recomputed(decoder: Decoder, length: int) -> Flops:
    """What the backward pass does of the forward pass once more, a token of rows of `length`.

    That is what the remat policy does not keep, less the products at a turn's end that the residual stream
    alone reads; and always attention's scores, which its backward kernel makes anew. The logits never are.
    """
    dims = decoder.dims
    products = causal = full = 0.0
    for name, param in decoder.spec().items():
        if name.startswith("stacks/") and _again(name, decoder):
            products += _products(param, dims) * _met(name, param, decoder)
    forward_again = not decoder.remat.keeps_attention
    for _, _, block, layers in decoder.blocks():
        per_product = 2 * dims["heads"] * dims["head_dim"]
        times = layers.count * per_product * (1 + 2 * forward_again)
        full += times * length
        causal += times * mean_seen(length, block.attention.window)
    return Flops(2 * products + causal, 2 * products + full)


def _again(name: str, decoder: Decoder) -> bool:
    """Whether the product with a layer's weight is computed again."""
    if decoder.remat in (Remat.NONE, Remat.PRODUCTS, Remat.DOTS):
        return False
    _, s, b, _, *path = name.split("/")
    stack = decoder.stacks[int(s)]
    last = int(b) == len(stack.block) - 1
    if last and "/".join(path) in stack.block[-1].read_by_stream:
        return False
    return not (decoder.remat is Remat.QKV and "/".join(path) in QKV_WEIGHTS)


def active(decoder: Decoder) -> int:
    """How many of the parameters one token meets: all but the experts that it does not take."""
    counts = (
        math.prod(param.shape(decoder.dims)) * _met(name, param, decoder)
        for name, param in decoder.spec().items()
    )
    return round(sum(counts))


def described(model: Model, cost: Flops, form: Callable[[float], str]) -> str:
    """The cost of a token in words, with what is counted; `form` writes a number."""
    if isinstance(model, Decoder):
        return f"{form(cost.causal)} FLOPs a token (causal attention; {form(cost.full)} full)"
    return f"{form(cost.full)} FLOPs a token (6 x the weights of its matrices; attention is not counted)"


def mean_seen(length: int, window: int) -> float:
    """How many keys a query sees on average in a row of `length`, itself included (window 0: none)."""
    reach = min(window or length, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def _products(param: Param, dims: object) -> int:
    """Multiply-adds a token of a weight: its entries where it is a matrix, none where it scales or shifts."""
    axes = param.axes[_by_expert(param) :]
    matrix = len(axes) > 1 and "embed" in axes
    return math.prod(param.shape(dims)) if matrix else 0  # type: ignore[arg-type]


def _by_expert(param: Param) -> bool:
    """Whether each expert has a slice of a weight."""
    return param.axes[:1] == ("experts",)


def _met(name: str, param: Param, decoder: Decoder) -> float:
    """What share of a weight one token is multiplied with."""
    if not _by_expert(param):
        return 1.0
    _, stack, block, *_ = name.split("/")
    return decoder.stacks[int(stack)].block[int(block)].mlp.active(decoder.dims)


def _looked_up(name: str, decoder: Decoder) -> bool:
    return name.startswith("embed/") and not (name == "embed/tokens" and decoder.tied)
