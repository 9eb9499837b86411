"""What the TPU kernels say they cost: against a walk over their grids, and masks looked at entry by entry."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaicjax.kernels import flash_tpu
from mosaicjax.kernels.attention_blocks import Operands, Problem
from mosaicjax.kernels.flash_tpu import Call, Tiling

BLOCK = 128


def operands(rows, kv_heads, group, queries, keys, offset, slopes, sinks, segments, dtype):
    heads, rng = kv_heads * group, np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return Operands(
        numbers(rows, heads, queries, 64),
        numbers(rows, kv_heads, keys, 64),
        numbers(rows, kv_heads, keys, 32),
        jnp.asarray([offset], jnp.int32),
        jnp.ones(heads, jnp.float32) if slopes else None,
        jnp.ones(heads, jnp.float32) if sinks else None,
        jnp.ones((rows, queries), jnp.int32) if segments else None,
        jnp.ones((rows, keys), jnp.int32) if segments else None,
        offset,
    )


def calls(function, *arrays):
    """Each Pallas call in a function: its name, mappings, grid and estimate, and the prefetched arrays."""
    closed = jax.make_jaxpr(function)(*arrays)
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, jax.tree.leaves(arrays), strict=True))
    found = []
    for equation in closed.jaxpr.eqns:
        given = [v.val if hasattr(v, "val") else values[v] for v in equation.invars]
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            prefetched = given[: mapping.num_index_operands]
            found.append((mapping, prefetched, equation.params["cost_estimate"]))
            results = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in equation.outvars]
        else:
            results = equation.primitive.bind(*given, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return found


def moved(mapping, prefetched):
    """Bytes between HBM and VMEM: a block is moved where its index differs from the step's before."""
    steps = np.asarray(list(itertools.product(*map(range, mapping.grid))), np.int32)
    total = sum(4 * each.size for each in prefetched)
    for block in mapping.block_mappings:
        shape = [getattr(size, "block_size", size) for size in block.block_shape]
        place = jax.vmap(
            lambda step, block=block: jnp.stack(
                [jnp.asarray(n) for n in block.compute_start_indices_interpret(tuple(step), *prefetched)]
            )
        )
        places = np.asarray(place(jnp.asarray(steps)))
        assert (places >= 0).all() and (places + shape <= block.array_aval.shape).all()
        times = 1 + int(np.sum(np.any(places[1:] != places[:-1], axis=1)))
        total += times * int(np.prod(shape)) * block.array_aval.dtype.itemsize
    return total


def visits(problem, queries, keys, offset):
    """Pairs of blocks with an entry that is seen, of queries by keys: looked at one by one."""
    row, column = np.arange(queries)[:, None] + offset, np.arange(keys)[None]
    seen = np.ones((queries, keys), bool)
    if problem.causal:
        seen &= column <= row
    if problem.window:
        seen &= np.abs(row - column) < problem.window
    return seen.reshape(queries // BLOCK, BLOCK, keys // BLOCK, BLOCK).any(axis=(1, 3))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 2, 2, 3, 4))),
    resident=st.sampled_from([1, 2, 4]),
    knobs=st.tuples(*[st.booleans()] * 5),
    window=st.sampled_from([0, 1, 100, 129, 300]),
    offset=st.sampled_from([0, 60, 256, 1_000]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@example(
    # The last queries are so far behind the window that they see no key, of several chunks.
    sizes=(1, 1, 2, 3, 2),
    resident=1,
    knobs=(True, False, False, False, False),
    window=100,
    offset=256,
    dtype="bfloat16",
)
def test_estimates_are_exact(sizes, resident, knobs, window, offset, dtype):
    rows, kv_heads, group, q_blocks, k_blocks = sizes
    causal, capped, slopes, sinks, segments = knobs
    queries, keys = q_blocks * BLOCK, -(-k_blocks // resident) * resident * BLOCK
    x = operands(rows, kv_heads, group, queries, keys, offset, slopes, sinks, segments, dtype)
    problem = Problem(causal, window, 0.1, 5.0 if capped else 0.0, queries, keys, slopes)
    call = Call(problem, Tiling(BLOCK, BLOCK, resident * BLOCK, 0, BLOCK), interpret=True)
    grad = jnp.ones((*x.q.shape[:3], 32), dtype)
    lines = jnp.ones(x.q.shape[:3], jnp.float32)
    heads, entries = rows * kv_heads * group, BLOCK * BLOCK
    seen = visits(problem, queries, keys, offset)
    each = 2 if capped else 1

    ((mapping, prefetched, cost),) = calls(lambda x: flash_tpu.forward(call, x), x)
    assert cost.bytes_accessed == moved(mapping, prefetched)
    assert cost.flops == 2 * heads * seen.sum() * entries * (64 + 32)
    # Shares, the rescaling of a query's sums at each block, its logarithm, and two more with a sink.
    finish = heads * queries * (3 if sinks else 1)
    assert cost.transcendentals == heads * seen.sum() * (entries * each + BLOCK) + finish

    found = calls(lambda *each: flash_tpu.backward(call, *each), x, grad, lines, lines)
    chunks = [seen[:, n : n + resident].sum() for n in range(0, keys // BLOCK, resident)]
    chunks = [count for count in chunks if count]
    assert len(found) == len(chunks)
    for count, (mapping, prefetched, cost) in zip(chunks, found, strict=True):
        assert cost.bytes_accessed == moved(mapping, prefetched)
        assert cost.flops == 2 * heads * count * entries * (3 * 64 + 2 * 32)
        assert cost.transcendentals == heads * count * entries * each


@pytest.mark.parametrize("queries", [129, 250])
def test_padding_is_counted_as_it_is_worked_on(queries):
    x = operands(1, 1, 1, queries, queries, 0, False, False, False, "float32")
    problem = Problem(True, 0, 0.1, 0.0, queries, queries)
    call = Call(problem, Tiling(BLOCK, BLOCK, 2 * BLOCK, 0, BLOCK), interpret=True)
    ((_, _, cost),) = calls(lambda x: flash_tpu.forward(call, x), x)
    assert cost.flops == 2 * 3 * BLOCK * BLOCK * (64 + 32)
