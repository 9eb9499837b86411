"""The MPT family (MosaicML 2023): ALiBi, no biases, exact GELU, tied embeddings, and every knob beside.

Source: llm-foundry `MPTConfig`, `attention_config_defaults`, `ffn_config_defaults`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block
from mosaicjax.layers.inits import InitRule, Kaiming
from mosaicjax.layers.mlp import Glu, Mlp
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import LayerNorm, Norm, RmsNorm
from mosaicjax.layers.position import Alibi, Learned, Position, Rotary
from mosaicjax.layers.token_inputs import TokenInput
from mosaicjax.models import mpt_hf
from mosaicjax.models.decoder import VALUE_DIM, Decoder, Remat, Stack
from mosaicjax.models.family import Family
from mosaicjax.models.hf_config import HfConfig, refuse_others
from mosaicjax.models.names import Names
from mosaicjax.spec import join_dims


@dataclass(frozen=True)
class Config(Family):
    """Sizes and choices of an MPT.

    `kv_heads` 0 gives every head its own keys; `head_dim` 0 is embed / heads. `windows` gives the layers
    sliding windows in turn (0: none). Zero turns `clip_qkv`, the softcaps and `softmax_scale` off.
    `attention` may be a class of one's own: the knobs here are put into it. With `ffn` a `Moe`, `experts` is
    how many it chooses from, each with a hidden layer of `mlp`. `bias` gives attention and MLP their biases;
    the norm says its own. `block` may have knobs that are not here, `inputs` are added to the embeddings, and
    layers take `value_tables` value embeddings in turn (0: none).
    """

    layers: int = 24
    embed: int = 2_048
    heads: int = 16
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 4 * 2_048
    vocab: int = 50_368
    position: Position = Alibi()
    norm: Norm = LayerNorm(bias=False)
    attention: Attention = Attention()
    ffn: Mlp = Mlp()
    experts: int = 0
    bias: bool = False
    qk_norm: QkNorm | None = None
    clip_qkv: float = 0.0
    softmax_scale: float = 0.0
    attention_softcap: float = 0.0
    windows: tuple[int, ...] = (0,)
    tied: bool = True
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    embedding_fraction: float = 1.0
    residual_dropout: float = 0.0
    embed_dropout: float = 0.0
    block: Block = Block()
    inputs: tuple[TokenInput, ...] = ()
    value_tables: int = 0
    init: InitRule = Kaiming()
    remat: Remat = Remat.NONE

    def dims(self) -> dict[str, int]:
        """Sizes by axis name.

        Raises:
            InputError: the position names one of these dims and gives it another size.
        """
        sizes = {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.embed // max(self.heads, 1),
            "mlp": self.mlp,
            "vocab": self.vocab,
        }
        sizes |= {"experts": self.experts} if self.experts else {}
        sizes |= {VALUE_DIM: sizes["kv_heads"] * sizes["head_dim"]} if self.value_tables else {}
        return join_dims(sizes, self.position.dims, *(part.dims for part in self.inputs))

    def build(self) -> Decoder:
        """The decoder.

        Raises:
            InputError: heads that do not divide the width, or windows that do not divide the layers.
        """
        if self.heads < 1 or (not self.head_dim and self.embed % self.heads):
            raise InputError(
                "heads must divide embed",
                expected=f"a divisor of {self.embed}",
                got=self.heads,
                fix="another number of heads, or head_dim",
            )
        if not self.windows or self.layers % len(self.windows):
            raise InputError(
                "windows are taken in turn",
                expected=f"a number of them that divides {self.layers}",
                got=self.windows,
            )
        if self.experts and not isinstance(self.ffn, Moe):
            raise InputError("experts in a model without them", got=self.experts, fix="ffn=Moe(...), or 0")
        learned = isinstance(self.position, Learned)
        turn = math.lcm(len(self.windows), max(self.value_tables, 1))
        if self.layers % turn or self.value_tables < 0:
            raise InputError(
                "value tables are taken in turn",
                expected=f"0, or a number of them that divides {self.layers} layers with the windows",
                got=self.value_tables,
            )
        blocks = tuple(
            replace(
                self.block,
                attention=replace(
                    self.attention,
                    position=Position() if learned else self.position,
                    window=self.windows[layer % len(self.windows)],
                    value_table=layer % self.value_tables if self.value_tables else None,
                    qk_norm=self.qk_norm,
                    clip_qkv=self.clip_qkv,
                    softcap=self.attention_softcap,
                    scale=self.softmax_scale,
                    bias=self.bias,
                ),
                mlp=replace(self.ffn, bias=self.ffn.bias or self.bias),
                norm=self.norm,
                dropout=self.residual_dropout,
            )
            for layer in range(turn)
        )
        return Decoder(
            dims=self.dims(),
            stacks=(Stack(blocks, self.layers // len(blocks)),),
            norm=self.norm,
            position=self.position,
            init=self.init,
            tied=self.tied,
            logit_scale=self.logit_scale,
            softcap=self.logit_softcap,
            embedding_fraction=self.embedding_fraction,
            embed_dropout=self.embed_dropout,
            inputs=self.inputs,
            value_tables=self.value_tables,
            remat=self.remat,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Self:
        """See `Family.from_hf`; the keys mean what they mean in llm-foundry, see `mpt_hf`."""
        config.skip(*mpt_hf.TRAINING)
        mpt_hf.refuse_unknown(config)
        foundry, attention = mpt_hf.from_foundry(config), config.part("attn_config")
        embed, heads = config.need("d_model"), config.need("n_heads")
        config.only("head_dim", embed // max(heads, 1))
        bias = not config.get("no_bias", not foundry)
        config.only("attention_bias", bias)
        ffn, width = mpt_hf.ffn_from_hf(config, embed)
        return cls(
            layers=config.need("n_layers"),
            embed=embed,
            heads=heads,
            kv_heads=mpt_hf.kv_heads_from_hf(attention, heads),
            mlp=width,
            vocab=config.need("vocab_size"),
            position=mpt_hf.position_from_hf(config, foundry),
            norm=mpt_hf.norm_from_hf(config, bias),
            ffn=ffn,
            bias=bias,
            qk_norm=mpt_hf.qk_norm_from_hf(attention, bias),
            clip_qkv=float(attention.get("clip_qkv", 0.0)),
            softmax_scale=mpt_hf.above_zero(attention, "softmax_scale"),
            attention_softcap=mpt_hf.above_zero(attention, "attn_logit_softcapping"),
            windows=(mpt_hf.window_from_hf(attention),),
            tied=config.get("tie_word_embeddings", True),
            logit_scale=mpt_hf.logit_scale_from_hf(config, embed),
            logit_softcap=mpt_hf.above_zero(config, "final_logit_softcapping"),
            embedding_fraction=config.get("embedding_fraction", 1.0),
        )

    def to_hf(self, length: int) -> dict[str, Any]:
        """See `Family.to_hf`: Transformers' own MPT, which has few of the knobs; llm-foundry reads it too.

        Embedding fraction and dropout are written down: they belong to training and change no logits.
        """
        self._check_published()
        self._check_transformers()
        low_precision = isinstance(self.norm, LayerNorm) and self.norm.low_precision
        return {
            "architectures": ["MptForCausalLM"],
            "model_type": "mpt",
            "d_model": self.embed,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "expansion_ratio": 4,
            "max_seq_len": length,
            "vocab_size": self.vocab,
            "learned_pos_emb": False,
            "attn_config": {
                "attn_type": "multihead_attention",
                "alibi": True,
                "alibi_bias_max": 8,
                "clip_qkv": self.clip_qkv or None,
                "softmax_scale": self.softmax_scale or None,
                "qk_ln": False,
                "prefix_lm": False,
            },
            "no_bias": True,
            "norm_type": "low_precision_layernorm" if low_precision else "layernorm",
            "layer_norm_epsilon": self.norm.eps,
            "norm_eps": self.norm.eps,
            "embedding_fraction": self.embedding_fraction,
            "resid_pdrop": self.residual_dropout,
            "emb_pdrop": self.embed_dropout,
            "tie_word_embeddings": self.tied,
        }

    def names(self) -> Names:
        """See `Family.names`: those of llm-foundry, of which Transformers' are a part."""
        self._check_published()
        per_head = self.qk_norm is not None and self.qk_norm.per_head
        norms = mpt_hf.QK_NORM_PER_HEAD if per_head else mpt_hf.QK_NORM
        copies = ("lm_head.weight",) if self.tied else ()
        return Names(mpt_hf.TENSORS + norms, base="transformer.", ignored=(*mpt_hf.BUFFERS, *copies))

    def _check_transformers(self) -> None:
        """Refuse what Transformers' MPT cannot do, though its `config.json` may have a key for it.

        Raises:
            InputError: with the knob.
        """
        low_precision = isinstance(self.norm, LayerNorm) and self.norm.low_precision
        refuse_others(
            "MPT",
            {
                "heads": (self.embed % max(self.heads, 1), 0),
                "kv_heads": (self.kv_heads or self.heads, self.heads),
                "head_dim": (self.dims()["head_dim"] * self.heads, self.embed),
                "mlp": (self.mlp, 4 * self.embed),
                "position": (self.position, Alibi()),
                "norm": (self.norm, LayerNorm(self.norm.eps, bias=False, low_precision=low_precision)),
                "ffn": (self.ffn, Mlp()),
                "bias": (self.bias, False),
                "qk_norm": (self.qk_norm, None),
                "attention_softcap": (self.attention_softcap, 0.0),
                "windows": (self.windows, (0,) * len(self.windows)),
                "logit_scale": (self.logit_scale, 1.0),
                "logit_softcap": (self.logit_softcap, 0.0),
            },
        )

    def _check_published(self) -> None:
        """Refuse layers whose weights have no place in a checkpoint.

        Raises:
            InputError: with the knob.
        """
        refuse_others(
            "MPT",
            {
                "block": (self.block, Block()),
                "inputs": (self.inputs, ()),
                "value_tables": (self.value_tables, 0),
                "attention.sinks": (self.attention.sinks, False),
            },
        )
        norms: set[type] = {LayerNorm, RmsNorm}
        known: dict[str, tuple[object, set[type]]] = {
            "attention": (self.attention, {Attention}),
            "ffn": (self.ffn, {Mlp, Glu}),
            "norm": (self.norm, norms),
            "qk_norm.norm": (self.qk_norm.norm if self.qk_norm else self.norm, norms),
            "position": (self.position, {Position, Alibi, Learned, Rotary}),
        }
        for knob, (value, kinds) in known.items():
            if type(value) not in kinds:
                raise InputError(
                    f"{knob} of this kind has no place in a checkpoint of MPT's",
                    expected=" or ".join(sorted(kind.__name__ for kind in kinds)),
                    got=type(value).__name__,
                )
