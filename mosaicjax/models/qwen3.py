"""Qwen3, the dense ones (Alibaba 2025): a Llama with a norm on every head's queries and keys.

Source: Qwen Team 2025, arXiv 2505.09388.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.block import Block
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.llama_like import HfForm, LlamaLike, window_from_hf

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Config(LlamaLike):
    """Sizes and choices of a Qwen3; the defaults are Qwen3-0.6B.

    `attention_bias` gives queries, keys, values and attention's output their biases. `windows` gives the
    layers sliding windows in turn (0: none).

    Source: arXiv 2505.09388, table 1; `config.json` of Qwen/Qwen3-0.6B.
    """

    layers: int = 28
    embed: int = 1_024
    heads: int = 16
    mlp: int = 3_072
    vocab: int = 151_936
    position: Rotary = Rotary(theta=1_000_000.0)
    norm: RmsNorm = RmsNorm(eps=1e-6)
    tied: bool = True
    attention_bias: bool = False
    windows: tuple[int, ...] = (0,)

    hf: ClassVar[HfForm] = HfForm("qwen3", "Qwen3ForCausalLM", length=32_768, kv_heads=32, head_dim=128)

    def block(self, layer: int) -> Block:
        """See `LlamaLike.block`.

        Raises:
            InputError: windows that do not divide the layers.
        """
        if not self.windows or self.layers % len(self.windows):
            raise InputError(
                "windows are taken in turn",
                expected=f"a number of them that divides {self.layers}",
                got=self.windows,
            )
        block = super().block(layer)
        attention = replace(
            block.attention,
            window=self.windows[layer % len(self.windows)],
            qk_norm=QkNorm(self.norm, per_head=True),
            bias=self.attention_bias,
        )
        return replace(block, attention=attention)

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        return replace(
            super().from_hf(config),
            attention_bias=config.get("attention_bias", False),
            windows=_shortest_turn(_windows_from_hf(config)),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`."""
        sizes = sorted(set(self.windows) - {0})
        if len(sizes) > 1:
            raise InputError("Transformers' Qwen3 has one window", expected="one size beside 0", got=sizes)
        windows = [block.attention.window for block in map(self.block, range(self.layers))]
        full_first = next((layer for layer, window in enumerate(windows) if window), self.layers)
        return super().to_hf(length) | {
            "attention_bias": self.attention_bias,
            "use_sliding_window": bool(sizes),
            "sliding_window": sizes[0] if sizes else None,
            "max_window_layers": full_first,
            "layer_types": [SLIDING if window else FULL for window in windows],
        }


def _windows_from_hf(config: HfConfig) -> tuple[int, ...]:
    """Each layer's window.

    Raises:
        InputError: kinds of layers that are not known, too many or too few of them, or no size for a window.
    """
    layers = config.need("num_hidden_layers")
    window = window_from_hf(config, default=4_096) if config.get("use_sliding_window", False) else 0
    # Published files give a size even where no window is in use.
    config.skip("sliding_window")
    full_first = config.get("max_window_layers", 28)
    usual = [SLIDING if window and layer >= full_first else FULL for layer in range(layers)]
    kinds = config.get("layer_types", usual)
    if len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise InputError(
            f"{config.where}: layer_types", expected=f"{layers} times {FULL} or {SLIDING}", got=kinds
        )
    if SLIDING in kinds and not window:
        raise InputError(
            f"{config.where}: layer_types names {SLIDING}, but no window is in use",
            expected="use_sliding_window true and a sliding_window",
            got=f"{config.get('use_sliding_window', False)} and {config.get('sliding_window', None)}",
        )
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def _shortest_turn(windows: Sequence[int]) -> tuple[int, ...]:
    """The fewest windows that give the same when they are taken in turn."""
    count = len(windows)
    for turn in range(1, count):
        if count % turn == 0 and all(windows[layer] == windows[layer % turn] for layer in range(count)):
            return tuple(windows[:turn])
    return tuple(windows)
