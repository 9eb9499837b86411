"""What training and evaluation ask of a model, be it a `Decoder` or a module of one's own."""

from __future__ import annotations

from typing import Any, Protocol

from jax import Array

from mosaicjax.layers.context import Context
from mosaicjax.models.decoder import Output
from mosaicjax.spec import Dims, Spec


class Model(Protocol):
    """Weights declared once, and a pure function of them from tokens to logits."""

    @property
    def dims(self) -> Dims:
        """Sizes by axis name, `vocab` among them."""
        ...

    @property
    def drops(self) -> bool:
        """Whether anything is dropped out in training."""
        ...

    @property
    def places(self) -> tuple[str, ...]:
        """What each number of a measured `Output` is of, in the order of the forward pass."""
        ...

    def spec(self) -> Spec:
        """Every weight, declared once."""
        ...

    def check(self, length: int) -> None:
        """Refuse what cannot be, for rows of so many tokens.

        Raises:
            InputError: with expected and got.
        """
        ...

    def embed(self, weights: Any, tokens_BL: Array, context: Context) -> Array:
        """What `hidden` takes of the tokens."""
        ...

    def hidden(self, weights: Any, x: Array, context: Context, *, measure: bool = False) -> Output:
        """What `logits` reads, for every token."""
        ...

    def head(self, weights: Any, context: Context) -> Any:
        """The weights that `logits` reads with, whole."""
        ...

    def logits(self, head: Any, hidden: Array, context: Context) -> Array:
        """Scores of the next token, [B, L, V], in the reduce dtype."""
        ...
