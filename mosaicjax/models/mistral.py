"""Mistral (Mistral AI 2023): a Llama whose attention may look through a sliding window.

Source: Jiang et al. 2023, arXiv 2310.06825.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mosaicjax.layers.block import Block
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.llama_like import HfForm, LlamaLike, window_from_hf


@dataclass(frozen=True)
class Config(LlamaLike):
    """Sizes and choices of a Mistral; the defaults are Mistral-7B-v0.1.

    A query sees the last `window` positions, its own among them (0: all).

    Source: arXiv 2310.06825, table 1; `config.json` of mistralai/Mistral-7B-v0.1.
    """

    window: int = 4_096

    hf: ClassVar[HfForm] = HfForm("mistral", "MistralForCausalLM", length=131_072, kv_heads=8)

    def block(self, layer: int) -> Block:
        """See `LlamaLike.block`."""
        block = super().block(layer)
        return replace(block, attention=replace(block.attention, window=self.window))

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        return replace(super().from_hf(config), window=window_from_hf(config, default=4_096))

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`."""
        return super().to_hf(length) | {"sliding_window": self.window or None}
