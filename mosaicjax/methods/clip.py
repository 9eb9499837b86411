"""Gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from mosaicjax.errors import InputError
from mosaicjax.program import Method, Program


@dataclass(frozen=True)
class ClipGradients(Method):
    """Scale all gradients down together where their global norm is above `norm`.

    Source: Pascanu et al. 2013, arXiv 1211.5063.
    """

    norm: float = 1.0

    def __call__(self, program: Program) -> Program:
        """See `Method`."""
        if self.norm <= 0:
            raise InputError("ClipGradients.norm", expected="above 0", got=self.norm)
        clipped = optax.chain(optax.clip_by_global_norm(self.norm), program.optimizer)
        return program.refine(self, optimizer=clipped)
