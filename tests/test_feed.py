"""What a feed puts on the devices is what the stream reads, wherever each row goes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.feed import AHEAD, Feed
from mosaicjax.mesh import Mesh
from mosaicjax.program import Phase
from mosaicjax.run_data import open_data
from mosaicjax.step import Step
from tests import jobs


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return recipe_file.load(str(tiny_recipe)).recipe


def step_of(recipe, mesh, devices):
    program = recipe.program()[1]
    return Step(program, mesh.build(jax.devices()[:devices]), recipe.seed)


def delivered(recipe, mesh, devices, steps, start=0):
    stream = open_data(recipe).stream
    with Feed(stream, [step_of(recipe, mesh, devices)], start, steps) as feed:
        return stream, [feed.next() for _ in range(start, steps)]


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        (Mesh(fsdp=(1,)), 1),
        (Mesh(), 8),
        (Mesh(data=2, fsdp=(2,), tensor=2), 8),
        (Mesh(fsdp=(2, 2), tensor=2), 8),
        (Mesh(tensor=8, fsdp=(1,), rules={"heads": "none", "kv_heads": "none"}), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("isolate", [False, True])
def test_rows_are_those_of_the_stream(recipe, mesh, devices, isolate):
    recipe = replace(recipe, batch=16, microbatch=8, data=replace(recipe.data, isolate=isolate))
    stream, batches = delivered(recipe, mesh, devices, 5, start=2)
    names = {"tokens", "targets", "weights", "row"} | ({"segments", "positions"} if isolate else set())
    for step, batch in enumerate(batches, start=2):
        expected = stream.rows(step, range(16))
        assert set(batch) == names
        np.testing.assert_array_equal(np.asarray(batch["row"]), np.arange(16).reshape(2, 8))
        for name in names - {"row"}:
            whole = np.asarray(batch[name]).reshape(16, 32)
            np.testing.assert_array_equal(whole, expected[name], err_msg=name, strict=True)


def test_rows_past_the_batch_weigh_nothing(recipe):
    recipe = replace(recipe, batch=24, microbatch=16)
    stream, (batch,) = delivered(recipe, Mesh(), 8, 1)
    expected = stream.rows(0, range(24))
    assert batch["tokens"].shape == (2, 16, 32)
    for name in ("tokens", "targets", "weights"):
        whole = np.asarray(batch[name]).reshape(32, 32)
        np.testing.assert_array_equal(whole[:24], expected[name])
        assert not whole[24:].any()
    assert recipe.phase() == Phase(32, 24, 16)
    assert len(set(np.asarray(batch["row"]).ravel().tolist())) == 32


class Broken:
    """A stream whose batches from a step on cannot be read, and that notes which were asked for."""

    def __init__(self, stream, step):
        self._stream, self._step, self.asked = stream, step, []
        self.phase = stream.phase

    def rows(self, step, rows):
        self.asked.append(step)
        if step >= self._step:
            raise InputError("shard c/3 is damaged")
        return self._stream.rows(step, rows)


def test_a_failure_is_known_before_its_batch_is_needed(recipe):
    stream = Broken(open_data(recipe).stream, 4)
    with Feed(stream, [step_of(recipe, Mesh(), 8)], 0, 20) as feed:
        for step in range(4):
            assert (feed.failure is not None) == (step - 1 + AHEAD >= 4)
            feed.next()
    assert str(feed.failure) == "shard c/3 is damaged"
    assert stream.asked == list(range(len(stream.asked))) and len(stream.asked) <= 5 + AHEAD


def test_first_batches_that_cannot_be_read_are_refused_at_once(recipe):
    for step in (0, 1):
        with pytest.raises(InputError, match="^shard c/3 is damaged$"):
            Feed(Broken(open_data(recipe).stream, step), [step_of(recipe, Mesh(), 8)], 0, 20)


def test_the_last_batch_is_not_read_past(recipe):
    stream = Broken(open_data(recipe).stream, 3)
    with Feed(stream, [step_of(recipe, Mesh(), 8)], 0, 3) as feed:
        for _ in range(3):
            feed.next()
        assert feed.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4", "2 tensor 2"])
def test_each_process_reads_its_own_rows(tiny_recipe, recipe, mesh):
    results = jobs.run_job("feed_worker.py", tiny_recipe, mesh, count=2, devices=2)
    expected = open_data(recipe).stream.rows(1, range(8))["tokens"]
    read = []
    for result in results:
        assert result.returncode == 0, result
        said = json.loads(result.stdout.splitlines()[-1])
        read.append(said["read"])
        for row, tokens in said["shards"].items():
            assert expected[int(row)].tolist() == tokens
        assert sorted(map(int, said["shards"])) == said["read"]
    assert sorted(read[0] + read[1]) == list(range(8)), "every row is read by one process"
