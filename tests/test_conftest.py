import jax.numpy as jnp
import numpy as np
import pytest


def test_sums_of_unlike_dtypes_are_refused():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_sums_of_unlike_ranks_are_refused():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_missing_corpus_is_a_visible_skip(shared_data):
    with pytest.raises(pytest.skip.Exception, match=r"\.\./shared/data/no-such-corpus"):
        shared_data("no-such-corpus")


def test_eight_devices_hold_one_shard_each():
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    array = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec("x")))
    assert [shard.data.tolist() for shard in array.addressable_shards] == [
        [2.0 * i, 2.0 * i + 1] for i in range(8)
    ]
