"""The same model without loops over its layers, where a loop copies what it takes a slice of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from mosaicjax.mesh import Layout, shardings
from mosaicjax.models.decoder import Decoder, Stack
from mosaicjax.spec import LAYER_KEY


def unrolled(decoder: Decoder) -> Decoder:
    """The decoder with every layer a block of its own; it computes the same.

    A CPU's loop copies each layer's weights before it multiplies with them, which takes longer than the
    products of a few rows. The program grows with the number of layers, and with it the time to compile it.
    """
    return replace(decoder, stacks=tuple(Stack(stack.block * stack.repeat, 1) for stack in decoder.stacks))


def unrolled_weights(decoder: Decoder, weights: Any, layout: Layout) -> Any:
    """A decoder's weights as its `unrolled` form has them: each layer's in arrays of their own."""
    places = shardings(unrolled(decoder).spec(), layout)
    stacks: list[Any] = []
    for s, stack in enumerate(decoder.stacks):
        blocks: list[Any] = []
        for turn in range(stack.repeat):
            for b in range(len(stack.block)):
                target = places["stacks"][s][len(blocks)][LAYER_KEY]

                def cut(tree: Any, turn: int = turn) -> Any:
                    return jax.tree.map(lambda x: x[turn : turn + 1], tree)

                mine = jax.jit(cut, out_shardings=target)(weights["stacks"][s][b][LAYER_KEY])
                blocks.append({LAYER_KEY: mine})
        stacks.append(blocks)
    return {**weights, "stacks": stacks}


def loops_copy(layout: Layout) -> bool:
    """Whether the devices of a layout copy what a loop takes a slice of: CPUs do."""
    devices = layout.mesh.devices
    return bool(devices.flat[0].platform == "cpu")
