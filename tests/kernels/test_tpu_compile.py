"""Attention for TPUs without a TPU: what lowers without libtpu, and what libtpu's compiler makes of it."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernels.bundles import ENVIRONMENT, Compiler
from mosaicjax.kernels.attention_tiles import VMEM_LIMITS, tilings
from tests.kernels import tpu_compile_worker as worker

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "tests.kernels.tpu_compile_worker:kernels"
NO_LIBTPU = "libtpu, the TPU compiler, is not installed (pip install libtpu)"


def ask(task, cases, *paths):
    """What the worker found of each case in a process of its own, and whether that has loaded libtpu."""
    path = os.pathsep.join([*map(str, paths), str(ROOT)])
    done = subprocess.run(
        [sys.executable, worker.__file__, task, json.dumps(cases)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    answer = json.loads(done.stdout)
    return answer["found"], answer["libtpu"]


V5E = {"maker": "kernels", "kind": "TPU v5 lite"}
BLOCKS = [128, 128, 256]
"""Queries and keys of a block, and keys of a chunk: 1,000 keys are 4 chunks."""
DECODE = {"maker": "decode", "kind": "TPU v5 lite", "slots": 1_000}

# Beside each attention, how many backward calls it has: one for each chunk of keys that some query may see.
ATTENTION = {
    "plain": ({**V5E}, 1),
    "grouped heads, ALiBi and its slopes' gradients": ({**V5E, "kv_heads": 2, "alibi": True}, 1),
    "segments, odd lengths": ({**V5E, "segments": True, "queries": 509, "keys": 387, "causal": False}, 1),
    "wide values, softcap, one key head": (
        {**V5E, "head_dim": 96, "value_dim": 128, "softcap": 20.0, "kv_heads": 1},
        1,
    ),
    "float32, sinks, window": (
        {**V5E, "kind": "TPU v4", "dtype": "float32", "sinks": True, "window": 200},
        1,
    ),
    # Queries stand at 0 to 999.
    "chunks": ({**V5E, "blocks": BLOCKS, "queries": 1_000, "keys": 1_000, "alibi": True}, 4),
    # At 0 to 299: no query sees the chunks from 512 on.
    "fewer queries": ({**V5E, "blocks": BLOCKS, "queries": 300, "keys": 1_000, "sinks": True}, 2),
    # At 600 to 799: they see 501 to 799, in the chunks from 256, 512 and 768 on.
    "later queries in a window": (
        {**V5E, "blocks": BLOCKS, "queries": 200, "keys": 1_000, "q_offset": 600, "window": 100},
        3,
    ),
    "queries anywhere": ({**V5E, "blocks": BLOCKS, "queries": 200, "keys": 1_000, "traced": True}, 4),
    "chunks, not causal": (
        {**V5E, "blocks": BLOCKS, "queries": 130, "keys": 1_000, "causal": False, "softcap": 5.0},
        4,
    ),
}
DECODING = {
    "decode": {**DECODE, "head_dim": 64, "value_dim": 64},
    "decode with all": {
        **DECODE,
        "head_dim": 192,
        "value_dim": 128,
        "layers": 3,
        "alibi": True,
        "sinks": True,
        "window": 300,
        "softcap": 9.0,
        "dtype": "float32",
    },
}


def attention_calls(backward):
    """The kernels of an attention and its gradients."""
    return ["flash_attention_forward"] + ["flash_attention_backward"] * backward


def test_lowers_without_libtpu(tmp_path):
    (tmp_path / "libtpu.py").write_text("raise ImportError('kept out')\n")
    cases = {name: case for name, (case, _) in ATTENTION.items()} | DECODING
    found, libtpu = ask("lower", list(cases.values()), tmp_path)
    expected = {name: attention_calls(backward) for name, (_, backward) in ATTENTION.items()}
    expected |= {name: ["decode_attention"] for name in DECODING}
    assert dict(zip(cases, found, strict=True)) == expected
    assert not libtpu


# A chunk of 256 keys is 2 rows of segments, fewer than the 8 that a TPU's tile has; one of 2,560 is 5.
@pytest.mark.parametrize(
    ("case", "backward"),
    [
        ({"blocks": BLOCKS, "queries": 1_000, "keys": 1_000}, 4),
        ({"blocks": [512, 512, 4_096], "queries": 512, "keys": 5_000, "q_offset": 4_488}, 2),
    ],
)
def test_segments_lower_over_several_chunks(case, backward):
    assert worker.lower([{**V5E, **case, "segments": True}]) == [attention_calls(backward)]


LONG = 32_768
ALL = {"alibi": True, "segments": True, "sinks": True, "softcap": 30.0, "kv_heads": 2}
CORNERS = {
    ("v4", 64, 512): {"alibi": True, "kv_heads": 2},
    ("v4", 64, LONG): {"segments": True, "sinks": True},
    ("v4", 256, 512): {"dtype": "float32", "segments": True, "softcap": 20.0, "kv_heads": 1},
    ("v4", 256, LONG): {"window": 4_096, "segments": True},
    ("v5e", 64, 512): {"causal": False, "segments": True, "sinks": True},
    ("v5e", 64, LONG): {"alibi": True, "segments": True},
    ("v5e", 256, 512): {"queries": 500, "keys": 437, "causal": False, "window": 100},
    ("v5e", 256, LONG): {"softcap": 30.0, "kv_heads": 2},
    ("v5p", 64, 512): {"dtype": "float32", "alibi": True, "kv_heads": 1, "queries": 509, "keys": 510},
    ("v5p", 64, LONG): {"window": 1_000, "causal": False, "alibi": True},
    ("v5p", 256, 512): {"softcap": 30.0, "sinks": True, "segments": True},
    ("v5p", 256, LONG): {"queries": LONG - 100, "keys": LONG - 60, "segments": True},
    ("v6e", 64, 512): {**ALL, "value_dim": 128, "window": 300},
    ("v6e", 64, LONG): {"dtype": "float32", "window": 2_048},
    ("v6e", 256, 512): {"alibi": True, "window": 128, "kv_heads": 2},
    ("v6e", 256, LONG): ALL,
}


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    with Compiler() as compiler:
        yield compiler


@pytest.mark.peer
@pytest.mark.parametrize(
    ("chip", "head_dim", "length"),
    [
        pytest.param(*case, marks=[pytest.mark.soak] * (case[0] in ("v4", "v6e") and case[2] == LONG))
        for case in itertools.product(VMEM_LIMITS, (64, 256), (512, LONG))
    ],
)
def test_compiles_within_vmem_and_linear_memory(compiler, chip, head_dim, length):
    case = {"queries": length, "keys": length, "head_dim": head_dim, **CORNERS[chip, head_dim, length]}
    found = compiler(chip, KERNELS, kind=chip, **case)
    assert not found.error
    dtype, value_dim = case.get("dtype", "bfloat16"), case.get("value_dim", head_dim)
    chosen = tilings(chip, dtype, head_dim, value_dim, case["keys"], case.get("window", 0))
    resident = chosen[1].fitted(case["queries"], case["keys"]).resident
    forward, backward = (found.named(f"flash_attention_{which}") for which in ("forward", "backward"))
    assert (len(forward), len(backward)) == (1, -(-case["keys"] // resident))
    assert all(0 < kernel.vmem <= VMEM_LIMITS[chip] for kernel in forward + backward)
    # Each head by itself: q, k, v, the result and its gradient, and three gradients; a backward pass that
    # goes by chunks adds dq up in float32. Rows are padded to the 128 lanes. At 32,768 places and 4 heads the
    # bound is at most 640 MiB, where scores would be 2 GiB a head in bfloat16.
    rows, itemsize = worker.SHAPE["heads"] * length, jnp.dtype(dtype).itemsize
    assert found.temp <= rows * max(head_dim, value_dim, 128) * (8 * itemsize + 4)


FSDP, TENSOR = {"fsdp": [4]}, {"fsdp": [2], "tensor": 2}


def step_calls(forward, rows, heads):
    """Calls in a step: each kind's forward kernel so often, its backward once, on a device's rows and heads.

    256 places are one chunk. Two kinds of layers stand in the body of a scan over their two turns, so that
    each kind's kernels stand in the program once, whatever the number of layers.
    """
    shape = (rows, heads, 256, 64)
    calls = Counter()
    for kind in ("block0", "block1"):
        calls["flash_attention_forward", kind, shape] = forward
        calls["flash_attention_backward", kind, shape] = 1
    return calls


def counted(found):
    return Counter((kernel, kind, tuple(shape)) for kernel, kind, shape in found)


@pytest.mark.peer
def test_train_step_holds_our_kernels_on_each_devices_shard():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    # 8 rows of 4 heads: fsdp 4 leaves 2 rows, fsdp 2 x tensor 2 leaves 4 rows of 2 heads.
    cases = [
        ({"mesh": FSDP, "packed": True}, step_calls(1, 2, 4)),
        ({"mesh": TENSOR}, step_calls(1, 4, 2)),
        ({"mesh": {**TENSOR, "gather": "explicit"}}, step_calls(1, 4, 2)),
    ]
    found, libtpu = ask("steps", [case for case, _ in cases])
    assert libtpu
    for (case, expected), got in zip(cases, found, strict=True):
        assert counted(got) == expected, case


@pytest.mark.peer
@pytest.mark.soak
def test_train_step_repeats_the_forward_kernel_only_where_its_result_was_not_kept():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    # The backward kernel reads the forward's result and logsumexp: a policy that keeps neither runs it again.
    forward = {"attention": 1, "products": 1, "full": 2, "qkv": 2}
    found, _ = ask("steps", [{"mesh": TENSOR, "remat": remat} for remat in forward])
    for (remat, times), got in zip(forward.items(), found, strict=True):
        assert counted(got) == step_calls(times, 4, 2), remat


@pytest.mark.parametrize("mesh", [FSDP, TENSOR])
def test_train_step_on_cpu_devices_has_no_kernel(mesh):
    text = worker.step(jax.devices()[:4], mesh).lower().as_text()
    assert "dot_general" in text
    assert "custom_call @tpu_custom_call" not in text
