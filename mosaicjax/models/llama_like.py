"""What Llama, Mistral, Qwen3 and Mixtral share: RMS norms, rotary positions, gated MLPs, shared key heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.block import Block
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.mlp import Activation, Glu
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.models.decoder import Decoder, Remat, stacks_of
from mosaicjax.models.family import Family
from mosaicjax.models.hf_config import HfConfig, activation_from_hf, activation_to_hf, refuse_others
from mosaicjax.models.hf_rope import rope_to_hf, rotary_from_hf
from mosaicjax.models.names import Names, Tensor, whole


@dataclass(frozen=True)
class HfForm:
    """How Transformers calls a family, and what it takes for keys that a `config.json` lacks.

    `kv_heads` 0 means as many as there are heads, `head_dim` 0 embed / heads.
    """

    model_type: str
    architecture: str
    length: int
    eps: float = 1e-6
    theta: float = 10_000.0
    kv_heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class LlamaLike(Family):
    """Sizes and choices that the families have in common; each is a subclass.

    `attention` may be a class of one's own: the knobs here are put into it. `position` and `norm` are of one
    kind, with their own knobs.
    """

    layers: int = 32
    embed: int = 4_096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14_336
    vocab: int = 32_000
    position: Rotary = Rotary()
    norm: RmsNorm = RmsNorm()
    attention: Attention = Attention()
    activation: Activation = Activation.SILU
    tied: bool = False
    init: InitRule = InitRule(divide_residual=False)
    remat: Remat = Remat.NONE

    hf: ClassVar[HfForm]

    def dims(self) -> dict[str, int]:
        """Sizes by axis name."""
        return {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
            "vocab": self.vocab,
        }

    def block(self, layer: int) -> Block:
        """One layer, counted from 0."""
        return Block(
            attention=replace(self.attention, position=self.position),
            mlp=Glu(self.activation),
            norm=self.norm,
        )

    def build(self) -> Decoder:
        """The decoder."""
        return Decoder(
            dims=self.dims(),
            stacks=stacks_of([self.block(layer) for layer in range(self.layers)]),
            norm=self.norm,
            position=self.position,
            init=self.init,
            tied=self.tied,
            remat=self.remat,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`."""
        config.skip("attention_dropout")
        heads, embed = config.need("num_attention_heads"), config.need("hidden_size")
        kv_heads = heads if config.null("num_key_value_heads") else cls.hf.kv_heads or heads
        head_dim = config.get("head_dim", cls.hf.head_dim or embed // max(heads, 1))
        if head_dim < 1:
            raise InputError(f"{config.where}: dims of a head", expected="1 or more", got=head_dim)
        position = rotary_from_hf(config, head_dim, theta=cls.hf.theta, length=cls.hf.length)
        if position.fraction != 1.0:
            raise InputError(
                f"{config.where}: partial_rotary_factor is a knob that {cls.hf.model_type} lacks",
                expected="1.0",
                got=position.fraction,
            )
        return cls(
            layers=config.need("num_hidden_layers"),
            embed=embed,
            heads=heads,
            kv_heads=config.get("num_key_value_heads", kv_heads),
            head_dim=head_dim,
            mlp=config.need("intermediate_size"),
            vocab=config.need("vocab_size"),
            position=position,
            norm=RmsNorm(eps=config.get("rms_norm_eps", cls.hf.eps)),
            activation=activation_from_hf(config, "hidden_act", "silu"),
            tied=config.get("tie_word_embeddings", False),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`. Token ids are null: left out, they would be those of the published models."""
        self.check_published()
        return {
            "architectures": [self.hf.architecture],
            "model_type": self.hf.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": activation_to_hf(self.activation),
            "rms_norm_eps": self.norm.eps,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            **rope_to_hf(self.position, self.head_dim, length),
        }

    def names(self) -> Names:
        """See `Family.names`."""
        self.check_published()
        copies = ("lm_head.weight",) if self.tied else ()
        return Names(
            MODEL + ATTENTION + self.mlp_tensors,
            base="model.",
            ignored=("*rotary_emb.inv_freq", *copies),
        )

    @property
    def mlp_tensors(self) -> tuple[Tensor, ...]:
        """Where the weights of a layer's MLP lie."""
        return GLU

    def check_published(self) -> None:
        """Refuse what no checkpoint of the family can say.

        Raises:
            InputError: with the knob.
        """
        whole_head = self.position.turned(self.head_dim) == self.head_dim
        refuse_others(
            self.hf.model_type,
            {
                "attention": (self.attention, Attention()),
                "norm": (self.norm, RmsNorm(eps=self.norm.eps)),
                "position.fraction": (1.0 if whole_head else self.position.fraction, 1.0),
            },
        )


def window_from_hf(config: HfConfig, default: int) -> int:
    """`sliding_window`, 0 where it is null; `default` is what a missing key means.

    Raises:
        InputError: a window through which nothing could be seen.
    """
    if config.null("sliding_window"):
        return 0
    window: int = config.get("sliding_window", default)
    # Here 0 means no window, and there one without a position in it.
    if "sliding_window" in config and window < 1:
        raise InputError(f"{config.where}: sliding_window", expected="1 or more, or null", got=window)
    return window


MODEL = (
    whole("model.embed_tokens.weight", "embed/tokens", "vocab", "embed"),
    whole("model.norm.weight", "norm/scale", "embed"),
    whole("lm_head.weight", "head", "vocab", "embed"),
)
"""The tensors that are no layer's."""

_LAYER = "model.layers.{layer}"

ATTENTION = (
    whole(f"{_LAYER}.input_layernorm.weight", "attention_norm/scale", "embed"),
    whole(f"{_LAYER}.self_attn.q_proj.weight", "attention/query", "heads head_dim", "embed"),
    whole(f"{_LAYER}.self_attn.k_proj.weight", "attention/key", "kv_heads head_dim", "embed"),
    whole(f"{_LAYER}.self_attn.v_proj.weight", "attention/value", "kv_heads head_dim", "embed"),
    whole(f"{_LAYER}.self_attn.o_proj.weight", "attention/out", "embed", "heads head_dim"),
    whole(f"{_LAYER}.self_attn.q_proj.bias", "attention/query_bias", "heads head_dim"),
    whole(f"{_LAYER}.self_attn.k_proj.bias", "attention/key_bias", "kv_heads head_dim"),
    whole(f"{_LAYER}.self_attn.v_proj.bias", "attention/value_bias", "kv_heads head_dim"),
    whole(f"{_LAYER}.self_attn.o_proj.bias", "attention/out_bias", "embed"),
    whole(f"{_LAYER}.self_attn.q_norm.weight", "attention/query_norm/scale", "head_dim"),
    whole(f"{_LAYER}.self_attn.k_norm.weight", "attention/key_norm/scale", "head_dim"),
    whole(f"{_LAYER}.post_attention_layernorm.weight", "mlp_norm/scale", "embed"),
)
"""Norms and attention of a layer."""

GLU = (
    whole(f"{_LAYER}.mlp.gate_proj.weight", "mlp/gate", "mlp", "embed"),
    whole(f"{_LAYER}.mlp.up_proj.weight", "mlp/up", "mlp", "embed"),
    whole(f"{_LAYER}.mlp.down_proj.weight", "mlp/down", "embed", "mlp"),
    whole(f"{_LAYER}.mlp.gate_proj.bias", "mlp/gate_bias", "mlp"),
    whole(f"{_LAYER}.mlp.up_proj.bias", "mlp/up_bias", "mlp"),
    whole(f"{_LAYER}.mlp.down_proj.bias", "mlp/down_bias", "embed"),
)
"""A layer's gated MLP."""

EXPERTS = (
    whole(f"{_LAYER}.block_sparse_moe.gate.weight", "mlp/router", "experts", "embed"),
    whole(f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w1.weight", "mlp/gate", "mlp", "embed"),
    whole(f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w3.weight", "mlp/up", "mlp", "embed"),
    whole(f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w2.weight", "mlp/down", "embed", "mlp"),
)
"""A layer's router and experts."""
