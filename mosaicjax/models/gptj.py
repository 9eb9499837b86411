"""GPT-J (EleutherAI 2021), the base of Dolly v1: parallel layers with one norm, a part of each head rotated.

Source: Wang and Komatsuzaki 2021, mesh-transformer-jax; Transformers' `GPTJConfig` and `modeling_gptj`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from mosaicjax.layers.block import Block, ParallelBlock
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.models.gpt_like import GptLike, head_dim_of
from mosaicjax.models.hf_config import HfConfig, activation_from_hf, activation_to_hf, refuse_others
from mosaicjax.models.names import Names, whole

MODEL = "GPT-J"


@dataclass(frozen=True)
class Config(GptLike):
    """Sizes and choices of a GPT-J; the defaults are GPT-J-6B.

    Attention has no biases, the MLP and the head have.

    Source: `config.json` of EleutherAI/gpt-j-6b.
    """

    layers: int = 28
    embed: int = 4_096
    heads: int = 16
    mlp: int = 4 * 4_096
    vocab: int = 50_400
    position: Rotary = Rotary(fraction=0.25, pairs="adjacent")

    @property
    def head_bias(self) -> bool:
        """See `GptLike.head_bias`."""
        return True

    def block(self) -> Block:
        """See `GptLike.block`."""
        return ParallelBlock(
            attention=replace(self.attention, position=self.position),
            mlp=self.feed_forward(),
            norm=self.norm,
            dropout=self.residual_dropout,
            shared_norm=True,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        config.only("rotary", True)
        config.only("scale_attn_weights", True)
        config.skip(
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "n_positions",
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
        embed, heads = config.need("n_embd"), config.need("n_head")
        turned = config.get("rotary_dim", 64)
        return cls(
            layers=config.need("n_layer"),
            embed=embed,
            heads=heads,
            mlp=config.get("n_inner", 4 * embed),
            vocab=config.need("vocab_size"),
            position=Rotary(fraction=turned / head_dim_of(embed, heads), pairs="adjacent"),
            norm=LayerNorm(eps=config.get("layer_norm_epsilon", 1e-5)),
            activation=activation_from_hf(config, "activation_function", "gelu_new"),
            tied=config.get("tie_word_embeddings", False),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`. Token ids are null: left out, they would be those of the published model."""
        self.check_published(MODEL)
        published = Rotary(fraction=self.position.fraction, pairs="adjacent")
        refuse_others(MODEL, {"position": (self.position, published)})
        return {
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "vocab_size": self.vocab,
            "n_positions": length,
            "n_embd": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.mlp,
            "rotary_dim": self.position.turned(self.head_dim),
            "activation_function": activation_to_hf(self.activation),
            "layer_norm_epsilon": self.norm.eps,
            "resid_pdrop": self.residual_dropout,
            "embd_pdrop": self.embed_dropout,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def names(self) -> Names:
        """See `Family.names`."""
        self.check_published(MODEL)
        buffers = ("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions")
        return Names(TENSORS, base="transformer.", ignored=(*buffers, *self.copies()))


_LAYER = "transformer.h.{layer}"

TENSORS = (
    whole("transformer.wte.weight", "embed/tokens", "vocab", "embed"),
    whole("transformer.ln_f.weight", "norm/scale", "embed"),
    whole("transformer.ln_f.bias", "norm/bias", "embed"),
    whole("lm_head.weight", "head", "vocab", "embed"),
    whole("lm_head.bias", "head_bias", "vocab"),
    whole(f"{_LAYER}.ln_1.weight", "norm/scale", "embed"),
    whole(f"{_LAYER}.ln_1.bias", "norm/bias", "embed"),
    whole(f"{_LAYER}.attn.q_proj.weight", "attention/query", "heads head_dim", "embed"),
    whole(f"{_LAYER}.attn.k_proj.weight", "attention/key", "kv_heads head_dim", "embed"),
    whole(f"{_LAYER}.attn.v_proj.weight", "attention/value", "kv_heads head_dim", "embed"),
    whole(f"{_LAYER}.attn.out_proj.weight", "attention/out", "embed", "heads head_dim"),
    whole(f"{_LAYER}.mlp.fc_in.weight", "mlp/up", "mlp", "embed"),
    whole(f"{_LAYER}.mlp.fc_in.bias", "mlp/up_bias", "mlp"),
    whole(f"{_LAYER}.mlp.fc_out.weight", "mlp/down", "embed", "mlp"),
    whole(f"{_LAYER}.mlp.fc_out.bias", "mlp/down_bias", "embed"),
)
"""Where the weights lie in a checkpoint."""
