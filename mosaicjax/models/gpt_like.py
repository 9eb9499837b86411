"""What GPT-2, GPT-J and GPT-NeoX share: layer norms and MLPs with biases, as many key heads as heads."""

from __future__ import annotations

from dataclasses import dataclass

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.block import Block
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.mlp import Activation, Mlp
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Position
from mosaicjax.models.decoder import Decoder, Remat, Stack
from mosaicjax.models.family import Family
from mosaicjax.models.hf_config import refuse_others
from mosaicjax.spec import join_dims


@dataclass(frozen=True)
class GptLike(Family):
    """Sizes and choices that the families have in common; each is a subclass.

    `attention` may be a class of one's own: the family's knobs are put into it. Dropout is a choice of
    training: a `config.json` is not asked for it.
    """

    layers: int = 12
    embed: int = 768
    heads: int = 12
    mlp: int = 4 * 768
    vocab: int = 50_257
    position: Position = Position()
    norm: LayerNorm = LayerNorm()
    attention: Attention = Attention()
    activation: Activation = Activation.GELU_TANH
    tied: bool = False
    residual_dropout: float = 0.0
    embed_dropout: float = 0.0
    init: InitRule = InitRule()
    remat: Remat = Remat.NONE

    @property
    def head_dim(self) -> int:
        """Dims of a head.

        Raises:
            InputError: heads that do not divide the width.
        """
        return head_dim_of(self.embed, self.heads)

    def dims(self) -> dict[str, int]:
        """Sizes by axis name.

        Raises:
            InputError: heads that do not divide the width.
        """
        sizes = {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
            "vocab": self.vocab,
        }
        return join_dims(sizes, self.position.dims)

    def block(self) -> Block:
        """Any layer."""
        raise TypeError(f"{type(self).__name__} does not say what its layers are")

    @property
    def head_bias(self) -> bool:
        """Whether a bias is added to the logits."""
        return False

    def feed_forward(self) -> Mlp:
        """Any layer's MLP."""
        return Mlp(self.activation, bias=True)

    def build(self) -> Decoder:
        """The decoder.

        Raises:
            InputError: heads that do not divide the width.
        """
        return Decoder(
            dims=self.dims(),
            stacks=(Stack((self.block(),), self.layers),),
            norm=self.norm,
            position=self.position,
            init=self.init,
            tied=self.tied,
            head_bias=self.head_bias,
            embed_dropout=self.embed_dropout,
            remat=self.remat,
        )

    def check_published(self, model: str) -> None:
        """Refuse what no checkpoint of the family can say.

        Raises:
            InputError: with the knob.
        """
        refuse_others(
            model,
            {
                "attention": (self.attention, Attention()),
                "norm": (self.norm, LayerNorm(eps=self.norm.eps)),
            },
        )

    def copies(self) -> tuple[str, ...]:
        """Names of tensors that a checkpoint may hold beside those that they are tied to."""
        return ("lm_head.weight", "embed_out.weight") if self.tied else ()


def head_dim_of(embed: int, heads: int) -> int:
    """Dims of a head.

    Raises:
        InputError: heads that do not divide the width.
    """
    if heads < 1 or embed % heads:
        raise InputError("heads must divide embed", expected=f"a divisor of {embed}", got=heads)
    return embed // heads
