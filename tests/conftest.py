import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tests.jobs import xla_flags

# jax reads these when it is first imported: they must stand before any test module does that.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)

# Many tests start processes of their own, whose programs are the same: each is compiled once in a session.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"mosaicjax-tests-{os.getpid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_unconfigure(config):
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if cache.name == f"mosaicjax-tests-{os.getpid()}":
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    # Tests of sharding are worth nothing on one device, and would still pass.
    assert jax.device_count() == 8, "jax was imported before tests/conftest.py could ask for 8 CPU devices"


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("sotu")` is the path of a real corpus; the test is skipped where the corpora are not."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"no corpus at ../shared/data/{name} beside the project")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """A token store of 300 short documents, some 10% of them held out."""
    from tests import tiny

    return tiny.build_store(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_recipe(tiny_store):
    """A recipe file for it."""
    from tests import tiny

    return tiny.write_recipe(tiny_store.parent / "tiny.py", tiny_store)


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe, tmp_path_factory):
    """A finished run of the recipe's 6 steps, with norms and a trace of steps 2 and 3; only to be read."""
    from tests import tiny

    out = tmp_path_factory.mktemp("runs") / "tiny"
    tiny.train(tiny_recipe, out, "--log.norms", "True", "--profile", "2:3")
    return out


@pytest.fixture(scope="session")
def data_digests():
    """`data_digests(store)`: the SHA-256 of every file of a store but its manifest, by name."""

    def digests(store):
        files = (path for path in Path(store).rglob("*") if path.is_file() and path.name != "manifest.json")
        return {
            path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    return digests
