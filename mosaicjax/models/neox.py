"""GPT-NeoX (EleutherAI 2022): GPT-NeoX-20B, the Pythia suite, and Dolly v2 on top of it.

Source: Black et al. 2022, arXiv 2204.06745; Biderman et al. 2023, arXiv 2304.01373; Transformers'
`GPTNeoXConfig` and `modeling_gpt_neox`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from mosaicjax.layers.block import Block, ParallelBlock
from mosaicjax.layers.inits import InitRule, SmallInit
from mosaicjax.layers.mlp import Activation
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.models.gpt_like import GptLike, head_dim_of
from mosaicjax.models.hf_config import HfConfig, activation_from_hf, activation_to_hf
from mosaicjax.models.hf_rope import rope_to_hf, rotary_from_hf
from mosaicjax.models.names import PART, Names, Part, Tensor, whole

MODEL = "GPT-NeoX"

_BESIDE = ("rotary_emb_base", "rotary_pct")


@dataclass(frozen=True)
class Config(GptLike):
    """Sizes and choices of a GPT-NeoX; the defaults are Pythia-160M.

    With `parallel`, attention and MLP read the same stream, each through a norm of its own; else the MLP
    reads what attention has written.

    Source: arXiv 2304.01373, table 1; `config.json` of EleutherAI/pythia-160m.
    """

    vocab: int = 50_304
    position: Rotary = Rotary(fraction=0.25)
    activation: Activation = Activation.GELU
    parallel: bool = True
    attention_bias: bool = True
    init: InitRule = SmallInit()

    def block(self) -> Block:
        """See `GptLike.block`."""
        kind = ParallelBlock if self.parallel else Block
        return kind(
            attention=replace(self.attention, position=self.position, bias=self.attention_bias),
            mlp=self.feed_forward(),
            norm=self.norm,
            dropout=self.residual_dropout,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        config.skip("attention_dropout", "hidden_dropout", "classifier_dropout", "max_position_embeddings")
        embed, heads = config.need("hidden_size"), config.need("num_attention_heads")
        return cls(
            layers=config.need("num_hidden_layers"),
            embed=embed,
            heads=heads,
            mlp=config.need("intermediate_size"),
            vocab=config.need("vocab_size"),
            position=rotary_from_hf(config, head_dim_of(embed, heads), fraction=0.25, beside=_BESIDE),
            norm=LayerNorm(eps=config.get("layer_norm_eps", 1e-5)),
            activation=activation_from_hf(config, "hidden_act", "gelu"),
            parallel=config.get("use_parallel_residual", True),
            attention_bias=config.get("attention_bias", True),
            tied=config.get("tie_word_embeddings", False),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`.

        Token ids are null: left out, they would be those of the published models. Transformers drops out
        embeddings and residuals alike.
        """
        self.check_published(MODEL)
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp,
            "hidden_act": activation_to_hf(self.activation),
            "layer_norm_eps": self.norm.eps,
            "use_parallel_residual": self.parallel,
            "attention_bias": self.attention_bias,
            "hidden_dropout": self.residual_dropout,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            **rope_to_hf(self.position, self.head_dim, length, beside=_BESIDE),
        }

    def names(self) -> Names:
        """See `Family.names`."""
        self.check_published(MODEL)
        buffers = ("*.attention.bias", "*.attention.masked_bias", "*rotary_emb.inv_freq")
        return Names(TENSORS, base="gpt_neox.", ignored=(*buffers, *self.copies()))


_LAYER = "gpt_neox.layers.{layer}"


def _qkv(kind: str, suffix: str, *dims: str) -> Tensor:
    """Queries, keys and values of one head lie together, head after head."""
    rows = f"heads {PART} head_dim", f"kv_heads {PART} head_dim", f"kv_heads {PART} head_dim"
    weights = (f"attention/{name}{suffix}" for name in ("query", "key", "value"))
    parts = tuple(Part(weight, (row, *dims)) for weight, row in zip(weights, rows, strict=True))
    return Tensor(f"{_LAYER}.attention.query_key_value.{kind}", parts)


TENSORS = (
    whole("gpt_neox.embed_in.weight", "embed/tokens", "vocab", "embed"),
    whole("gpt_neox.final_layer_norm.weight", "norm/scale", "embed"),
    whole("gpt_neox.final_layer_norm.bias", "norm/bias", "embed"),
    whole("embed_out.weight", "head", "vocab", "embed"),
    whole(f"{_LAYER}.input_layernorm.weight", "attention_norm/scale", "embed"),
    whole(f"{_LAYER}.input_layernorm.bias", "attention_norm/bias", "embed"),
    whole(f"{_LAYER}.post_attention_layernorm.weight", "mlp_norm/scale", "embed"),
    whole(f"{_LAYER}.post_attention_layernorm.bias", "mlp_norm/bias", "embed"),
    _qkv("weight", "", "embed"),
    _qkv("bias", "_bias"),
    whole(f"{_LAYER}.attention.dense.weight", "attention/out", "embed", "heads head_dim"),
    whole(f"{_LAYER}.attention.dense.bias", "attention/out_bias", "embed"),
    whole(f"{_LAYER}.mlp.dense_h_to_4h.weight", "mlp/up", "mlp", "embed"),
    whole(f"{_LAYER}.mlp.dense_h_to_4h.bias", "mlp/up_bias", "mlp"),
    whole(f"{_LAYER}.mlp.dense_4h_to_h.weight", "mlp/down", "embed", "mlp"),
    whole(f"{_LAYER}.mlp.dense_4h_to_h.bias", "mlp/down_bias", "embed"),
)
"""Where the weights lie in a checkpoint."""
