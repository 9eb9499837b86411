"""Llama 2 and 3 (Meta 2023, 2024).

Source: Touvron et al. 2023, arXiv 2307.09288; Llama Team 2024, arXiv 2407.21783.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mosaicjax.errors import InputError
from mosaicjax.layers.block import Block
from mosaicjax.layers.position import Rotary
from mosaicjax.models.hf_config import HfConfig
from mosaicjax.models.llama_like import HfForm, LlamaLike


@dataclass(frozen=True)
class Config(LlamaLike):
    """Sizes and choices of a Llama; the defaults are Llama-3-8B.

    `attention_bias` gives queries, keys, values and attention's output their biases, `mlp_bias` the MLP.

    Source: arXiv 2407.21783, table 3; `config.json` of meta-llama/Meta-Llama-3-8B.
    """

    vocab: int = 128_256
    position: Rotary = Rotary(theta=500_000.0)
    attention_bias: bool = False
    mlp_bias: bool = False

    hf: ClassVar[HfForm] = HfForm("llama", "LlamaForCausalLM", length=2_048)

    def block(self, layer: int) -> Block:
        """See `LlamaLike.block`."""
        block = super().block(layer)
        return replace(
            block,
            attention=replace(block.attention, bias=self.attention_bias),
            mlp=replace(block.mlp, bias=self.mlp_bias),
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        # How products are cut into slices, whose sum is the same.
        config.skip("pretraining_tp")
        return replace(
            super().from_hf(config),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`."""
        if self.heads < 1 or self.embed % self.heads:
            raise InputError(
                "Transformers' Llama wants heads that divide embed, whatever head_dim is",
                expected=f"a divisor of {self.embed}",
                got=self.heads,
            )
        biases = {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        return super().to_hf(length) | biases
