"""Programs that test_tpu_compile.py lowers and compiles: `tpu_compile_worker.py lower|steps <JSON of cases>`.

`lower` needs no libtpu; `steps` compiles train steps with it. What was found goes to stdout as JSON, and
whether the process has loaded libtpu. `kernels` is also a maker for `benchmarks.kernels.bundles.Compiler`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from mosaicjax.data.mixture import TokenStore
from mosaicjax.kernels.decode_attention import decode_attention
from mosaicjax.kernels.flash_attention import flash_attention
from mosaicjax.kernels.flash_tpu import Tiling
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.recipe import Recipe
from mosaicjax.step import Step

SHAPE = {"queries": 512, "keys": 512, "head_dim": 64, "value_dim": 0, "heads": 4, "kv_heads": 4, "batch": 1}


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def kernels(
    kind, alibi=False, sinks=False, segments=False, traced=False, blocks=None, dtype="bfloat16", **others
):
    """Attention and its gradients for all numbers, and abstract arguments, which name the features.

    `kind` is a chip or a device kind, `blocks` those of both passes (None: the table's), `traced` an offset
    that is not known before any data; `others` are sizes as in SHAPE, and keywords of `flash_attention`.
    """
    shape = {name: others.pop(name, size) for name, size in SHAPE.items()}
    B, L, T = shape["batch"], shape["queries"], shape["keys"]
    H, K, C = shape["heads"], shape["kv_heads"], shape["head_dim"]
    V = shape["value_dim"] or C
    tiling = None if blocks is None else (Tiling(*blocks), Tiling(*blocks))
    numbers = {"q": array(B, L, H, C, dtype=dtype), "k": array(B, T, K, C, dtype=dtype)}
    numbers["v"] = array(B, T, K, V, dtype=dtype)
    for name, there in (("alibi_slopes", alibi), ("sinks", sinks)):
        if there:
            numbers[name] = array(H, dtype="float32")
    places = {}
    if segments:
        places = {"q_segments": array(B, L, dtype="int32"), "kv_segments": array(B, T, dtype="int32")}
    if traced:
        places["q_offset"] = array(dtype="int32")

    def gradients(numbers, places, grad):
        def attend(numbers):
            given = dict(numbers)
            q, k, v = (given.pop(name) for name in "qkv")
            return flash_attention(
                q, k, v, **given, **places, **others, implementation="pallas_tpu", chip=kind, tiling=tiling
            )

        return jax.vjp(attend, numbers)[1](grad)

    return gradients, (numbers, places, array(B, L, H, V, dtype=dtype))


def decode(kind, slots, head_dim, value_dim, alibi=False, sinks=False, layers=0, dtype="bfloat16", **knobs):
    """Attention of 3 newest tokens, 8 heads over 2, and its abstract arguments."""
    B, H, K = 3, 8, 2
    cache = (*([layers] if layers else []), B, K, slots)
    given = {"q_BHC": array(B, H, head_dim, dtype=dtype), "lengths_B": array(B, dtype="int32")}
    given |= {"k_BKTC": array(*cache, head_dim, dtype=dtype), "v_BKTV": array(*cache, value_dim, dtype=dtype)}
    for name, there in (("alibi_slopes", alibi), ("sinks", sinks)):
        if there:
            given[name] = array(H, dtype="float32")
    if layers:
        given["layer"] = array(dtype="int32")
    return lambda given: decode_attention(**given, **knobs, implementation="pallas_tpu", chip=kind), (given,)


def lower(cases):
    """The names of each case's kernels, in the order of its module."""
    found = []
    for case in cases:
        given = dict(case)
        function, arguments = globals()[given.pop("maker")](**given)
        text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        names = re.findall(r'@tpu_custom_call\(.*?kernel_name = "(\w+)"', text)
        assert len(names) == text.count("@tpu_custom_call"), "a kernel without a name"
        found.append(names)
    return found


MODEL = mpt.Config(layers=4, embed=256, heads=4, kv_heads=2, mlp=512, vocab=512, windows=(0, 100))
"""Layers in turn without and with a window: two kinds, each twice in the scan."""


def step(devices, mesh, remat="none", packed=False):
    """The train step of a recipe whose every other field is the default, on these devices."""
    recipe = Recipe(
        model=replace(MODEL, remat=Remat(remat)),
        data=TokenStore("none", isolate=packed),
        seq=256,
        batch=8,
        mesh=Mesh(**{name: tuple(size) if name == "fsdp" else size for name, size in mesh.items()}),
    )
    return Step(recipe.program()[1], recipe.mesh.build(devices), recipe.seed)


def steps(cases):
    """Kernel, layer kind and first result's shape of every Pallas call in each case's step, for a v5e."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    call = re.compile(r"%\S+ = \(?\w+\[([\d,]+)\].* custom_call_target=\"tpu_custom_call\"")
    place = re.compile(r'op_name="[^"]*/(block\d)/[^"]*/(\w+)/pallas_call"')
    found = []
    for case in cases:
        text = step(devices, **case).lower().compile().as_text()
        found.append([])
        for line in text.splitlines():
            shape = call.search(line)
            if shape:
                kind, kernel = place.search(line).groups()
                found[-1].append([kernel, kind, [int(size) for size in shape.group(1).split(",")]])
    return found


def main() -> None:
    task, given = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    # libtpu writes to stdout too.
    os.dup2(2, 1)
    found = lower(given) if task == "lower" else steps(given)
    json.dump({"found": found, "libtpu": "libtpu" in Path("/proc/self/maps").read_text()}, answers)
    answers.close()


if __name__ == "__main__":
    main()
