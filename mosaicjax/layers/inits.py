"""How a family's weights start: matrices, embeddings, and projections into the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from mosaicjax.spec import ZEROS, FanIn, Init, Normal


@dataclass(frozen=True)
class InitRule:
    """Normal draws of one standard deviation; the parent of the others.

    With `divide_residual`, projections into the residual stream are divided by sqrt(2 x layers), so that
    the stream's variance does not grow with depth. `embed_std` 0 gives embeddings the rule of matrices.
    `zero_residual` starts those projections at zero instead, so that every layer begins as the identity.

    Source: llm-foundry `init_div_is_residual`, `emb_init_std`; GPT-2, section 2.3.
    """

    std: float = 0.02
    divide_residual: bool = True
    embed_std: float = 0.0
    zero_residual: bool = False

    def matrix(self, fan_in: tuple[str, ...], scale: float = 1.0) -> Init:
        """The init of a matrix whose product sums over the axes `fan_in`, times `scale`."""
        return Normal(self.std * scale)

    def residual(self, fan_in: tuple[str, ...], layers: int) -> Init:
        """The init of a projection into the residual stream of a model with so many layers."""
        if self.zero_residual:
            return ZEROS
        return self.matrix(fan_in, scale=(2 * layers) ** -0.5 if self.divide_residual else 1.0)

    def embedding(self) -> Init:
        """The init of token and position tables."""
        return Normal(self.embed_std) if self.embed_std else self.matrix(("embed",))


@dataclass(frozen=True)
class Kaiming(InitRule):
    """Standard deviation `gain / sqrt(fan in)`, MPT's default (`kaiming_normal_`, for rectifiers)."""

    gain: float = 2**0.5

    def matrix(self, fan_in: tuple[str, ...], scale: float = 1.0) -> Init:
        """See `InitRule.matrix`."""
        return FanIn(fan_in, self.gain * scale)


@dataclass(frozen=True)
class SmallInit(InitRule):
    """Standard deviation `gain` / sqrt(embed), and 2 / (layers sqrt(embed)) into the residual stream.

    Source: GPT-NeoX-20B, arXiv 2204.06745, section 2.1.3: Nguyen and Salazar 2019 (gain sqrt(2 / 5)), Wang
    and Komatsuzaki 2021 (GPT-J, whose gain is 1).
    """

    gain: float = 0.4**0.5

    def matrix(self, fan_in: tuple[str, ...], scale: float = 1.0) -> Init:
        """See `InitRule.matrix`."""
        return FanIn(("embed",), self.gain * scale)

    def residual(self, fan_in: tuple[str, ...], layers: int) -> Init:
        """See `InitRule.residual`."""
        if self.zero_residual:
            return ZEROS
        return FanIn(("embed",), 2 / layers) if self.divide_residual else self.matrix(fan_in)
