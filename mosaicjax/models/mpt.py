"""The MPT family (MosaicML 2023): ALiBi, no biases, exact GELU, tied embeddings, and every knob beside.

Source: llm-foundry `MPTConfig`, `attention_config_defaults`, `ffn_config_defaults`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block
from mosaicjax.layers.inits import InitRule, Kaiming
from mosaicjax.layers.mlp import Mlp
from mosaicjax.layers.norm import LayerNorm, Norm
from mosaicjax.layers.position import Alibi, Learned, Position
from mosaicjax.models.decoder import Decoder, Remat, Stack
from mosaicjax.models.family import Family
from mosaicjax.spec import join_dims


@dataclass(frozen=True)
class Config(Family):
    """Sizes and choices of an MPT.

    `kv_heads` 0 gives every head its own keys; `head_dim` 0 is embed / heads. `windows` gives the layers
    sliding windows in turn (0: none). Zero turns `clip_qkv`, the softcaps and `softmax_scale` off.
    `attention` may be a class of one's own: the knobs here are put into it. `bias` gives attention and MLP
    their biases; the norm says its own.
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
        return join_dims(sizes, self.position.dims)

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
        learned = isinstance(self.position, Learned)
        blocks = tuple(
            Block(
                attention=replace(
                    self.attention,
                    position=Position() if learned else self.position,
                    window=window,
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
            for window in self.windows
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
            remat=self.remat,
        )
