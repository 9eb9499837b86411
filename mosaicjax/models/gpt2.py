"""GPT-2 (OpenAI 2019): learned positions, tied embeddings, biases everywhere.

Source: Radford et al. 2019; Transformers' `GPT2Config` and `modeling_gpt2`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from mosaicjax.layers.block import Block
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Learned
from mosaicjax.models.gpt_like import GptLike
from mosaicjax.models.hf_config import HfConfig, activation_from_hf, activation_to_hf
from mosaicjax.models.names import Names, Part, Tensor, whole

MODEL = "GPT-2"


@dataclass(frozen=True)
class Config(GptLike):
    """Sizes and choices of a GPT-2; the defaults are the smallest, of 124M weights.

    Without `scaled`, attention's scores are not divided by sqrt(head_dim).

    Source: `config.json` of openai-community/gpt2.
    """

    position: Learned = Learned(1_024)
    tied: bool = True
    scaled: bool = True

    def block(self) -> Block:
        """See `GptLike.block`."""
        scale = self.attention.scale if self.scaled else 1.0
        return Block(
            attention=replace(self.attention, bias=True, scale=scale),
            mlp=self.feed_forward(),
            norm=self.norm,
            dropout=self.residual_dropout,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        config.only("scale_attn_by_inverse_layer_idx", False)
        config.only("add_cross_attention", False)
        config.skip(
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "n_ctx",
            "reorder_and_upcast_attn",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
        embed = config.need("n_embd")
        return cls(
            layers=config.need("n_layer"),
            embed=embed,
            heads=config.need("n_head"),
            mlp=config.get("n_inner", 4 * embed),
            vocab=config.need("vocab_size"),
            position=Learned(config.get("n_positions", 1_024)),
            norm=LayerNorm(eps=config.get("layer_norm_epsilon", 1e-5)),
            activation=activation_from_hf(config, "activation_function", "gelu_new"),
            tied=config.get("tie_word_embeddings", True),
            scaled=config.get("scale_attn_weights", True),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`.

        `n_positions` is the length of the learned positions, whatever the model was trained for. Token ids
        are null: left out, they would be those of the published models.
        """
        self.check_published(MODEL)
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_positions": self.position.length,
            "n_embd": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.mlp,
            "activation_function": activation_to_hf(self.activation),
            "layer_norm_epsilon": self.norm.eps,
            "scale_attn_weights": self.scaled,
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
        buffers = ("*.attn.bias", "*.attn.masked_bias")
        return Names(TENSORS, base="transformer.", ignored=(*buffers, *self.copies()))


_LAYER = "transformer.h.{layer}"

# Its matrices lie as they are multiplied, [in, out], and so queries, keys and values are side by side.
TENSORS = (
    whole("transformer.wte.weight", "embed/tokens", "vocab", "embed"),
    whole("transformer.wpe.weight", "embed/positions", "position", "embed"),
    whole("transformer.ln_f.weight", "norm/scale", "embed"),
    whole("transformer.ln_f.bias", "norm/bias", "embed"),
    whole("lm_head.weight", "head", "vocab", "embed"),
    whole(f"{_LAYER}.ln_1.weight", "attention_norm/scale", "embed"),
    whole(f"{_LAYER}.ln_1.bias", "attention_norm/bias", "embed"),
    whole(f"{_LAYER}.ln_2.weight", "mlp_norm/scale", "embed"),
    whole(f"{_LAYER}.ln_2.bias", "mlp_norm/bias", "embed"),
    Tensor(
        f"{_LAYER}.attn.c_attn.weight",
        (
            Part("attention/query", ("embed", "heads head_dim")),
            Part("attention/key", ("embed", "kv_heads head_dim")),
            Part("attention/value", ("embed", "kv_heads head_dim")),
        ),
        joined=1,
    ),
    Tensor(
        f"{_LAYER}.attn.c_attn.bias",
        (
            Part("attention/query_bias", ("heads head_dim",)),
            Part("attention/key_bias", ("kv_heads head_dim",)),
            Part("attention/value_bias", ("kv_heads head_dim",)),
        ),
    ),
    whole(f"{_LAYER}.attn.c_proj.weight", "attention/out", "heads head_dim", "embed"),
    whole(f"{_LAYER}.attn.c_proj.bias", "attention/out_bias", "embed"),
    whole(f"{_LAYER}.mlp.c_fc.weight", "mlp/up", "embed", "mlp"),
    whole(f"{_LAYER}.mlp.c_fc.bias", "mlp/up_bias", "mlp"),
    whole(f"{_LAYER}.mlp.c_proj.weight", "mlp/down", "mlp", "embed"),
    whole(f"{_LAYER}.mlp.c_proj.bias", "mlp/down_bias", "embed"),
)
"""Where the weights lie in a checkpoint."""
