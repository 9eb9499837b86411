"""Mixtral (Mistral AI 2024): a Mistral whose MLPs are mixtures of experts.

Source: Jiang et al. 2024, arXiv 2401.04088.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mosaicjax.layers.block import Block
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.position import Rotary
from mosaicjax.models.hf_config import HfConfig, refuse_others
from mosaicjax.models.llama_like import EXPERTS, HfForm, LlamaLike, window_from_hf
from mosaicjax.models.names import Tensor


@dataclass(frozen=True)
class Config(LlamaLike):
    """Sizes and choices of a Mixtral; the defaults are Mixtral-8x7B-v0.1.

    Each of the `experts` has a hidden layer of `mlp`; `ffn` says how many of them a token takes, and the
    losses that keep them in balance. A query sees the last `window` positions, its own among them (0: all).

    Source: arXiv 2401.04088, table 1; `config.json` of mistralai/Mixtral-8x7B-v0.1.
    """

    position: Rotary = Rotary(theta=1_000_000.0)
    experts: int = 8
    ffn: Moe = Moe()
    window: int = 0

    hf: ClassVar[HfForm] = HfForm(
        "mixtral", "MixtralForCausalLM", length=131_072, eps=1e-5, theta=1_000_000.0, kv_heads=8
    )

    def dims(self) -> dict[str, int]:
        """See `LlamaLike.dims`."""
        return super().dims() | {"experts": self.experts}

    def block(self, layer: int) -> Block:
        """See `LlamaLike.block`."""
        block = super().block(layer)
        return replace(
            block,
            attention=replace(block.attention, window=self.window),
            mlp=replace(self.ffn, activation=self.activation),
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`; how experts were kept in balance is a choice of training, not read here."""
        config.skip("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
        return replace(
            super().from_hf(config),
            experts=config.get("num_local_experts", 8),
            ffn=Moe(top_k=config.get("num_experts_per_tok", 2)),
            window=window_from_hf(config, default=0),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`."""
        return super().to_hf(length) | {
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.ffn.top_k,
            "sliding_window": self.window or None,
        }

    @property
    def mlp_tensors(self) -> tuple[Tensor, ...]:
        """See `LlamaLike.mlp_tensors`."""
        return EXPERTS

    def check_published(self) -> None:
        """See `LlamaLike.check_published`."""
        super().check_published()
        refuse_others(
            self.hf.model_type,
            {
                "ffn.gated": (self.ffn.gated, True),
                "ffn.renormalise": (self.ffn.renormalise, True),
                "ffn.bias": (self.ffn.bias, False),
            },
        )
