"""Files of a run on this machine and on an object store, seen from outside by `open` and boto3."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorstore as ts

from mosaicjax import storage
from mosaicjax.errors import InputError
from tests import object_store


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, monkeypatch):
    return str(tmp_path) if request.param == "local" else object_store.new_bucket(monkeypatch) + "/run"


def content(path: str) -> bytes:
    """Read a file without the code under test."""
    if not path.startswith("s3://"):
        with open(path, "rb") as file:
            return file.read()
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return object_store.client().get_object(Bucket=bucket, Key=key)["Body"].read()


@pytest.mark.parametrize(
    ("path", "remote", "joined"),
    [
        ("/data/run", False, "/data/run/a/b"),
        ("run", False, "run/a/b"),
        ("s3://bucket", True, "s3://bucket/a/b"),
        ("s3://bucket/run/", True, "s3://bucket/run/a/b"),
        ("gs://bucket/run", True, "gs://bucket/run/a/b"),
    ],
)
def test_paths_join_and_know_where_they_lie(path, remote, joined):
    assert storage.is_remote(path) is remote
    assert storage.join(path, "a", "b") == joined


def test_file_urls_and_home_are_local(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    assert not storage.is_remote("file:///data/run")
    assert storage.local("file:///data/run/") == "/data/run"
    assert storage.local("~/run") == "/home/reader/run"


def test_what_is_written_is_there(root):
    path = storage.join(root, "deep", "log.txt")
    assert not storage.exists(path)
    storage.write_text(path, "größer")
    assert content(path) == "größer".encode()
    assert storage.exists(path) and storage.exists(storage.join(root, "deep"))
    storage.write_bytes(path, b"\0\xff")
    assert content(path) == b"\0\xff" == storage.read_bytes(path)


def test_list_and_remove(root):
    for name in ("b/1", "b/2", "a", "bb"):
        storage.write_text(storage.join(root, *name.split("/")), name)
    assert storage.list_dir(root) == ["a", "b", "bb"]
    storage.remove_tree(storage.join(root, "b"))
    assert storage.list_dir(root) == ["a", "bb"]
    storage.remove_tree(storage.join(root, "b"))
    storage.remove_tree(storage.join(root, "a"))
    assert storage.list_dir(root) == ["bb"]
    assert storage.list_dir(storage.join(root, "none")) == []


def test_listings_see_what_others_write(root):
    storage.write_text(storage.join(root, "mine"), "")
    assert storage.list_dir(root) == ["mine"]
    other = storage.join(root, "theirs")
    if storage.is_remote(root):
        bucket, _, key = other.removeprefix("s3://").partition("/")
        object_store.client().put_object(Bucket=bucket, Key=key, Body=b"x")
    else:
        with open(other, "w") as file:
            file.write("x")
    assert storage.list_dir(root) == ["mine", "theirs"]
    assert storage.read_text(other) == "x"


def test_copy_between_stores(tmp_path, monkeypatch):
    bucket = object_store.new_bucket(monkeypatch)
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "in").write_bytes(data)
    storage.copy_file(tmp_path / "in", f"{bucket}/there")
    assert content(f"{bucket}/there") == data
    storage.copy_file(f"{bucket}/there", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == data
    assert sorted(os.listdir(tmp_path / "new")) == ["back"]


def test_a_process_that_turns_to_another_server(monkeypatch):
    """The endpoint of the environment counts at every call; the file system of the first is not kept."""
    root = object_store.new_bucket(monkeypatch)
    storage.write_bytes(root + "/a", b"first")
    other = object_store.serve()
    host, port = other.get_host_and_port()
    # Servers of one process share what they hold: only requests that reach the second are counted.
    app, paths = other._server.app, []
    other._server.app = lambda environ, answer: paths.append(environ["PATH_INFO"]) or app(environ, answer)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        assert storage.read_bytes(root + "/a") == b"first" and paths
    object_store.stop(other)
    assert storage.read_bytes(root + "/a") == b"first"


def test_local_write_is_never_seen_in_part(tmp_path):
    path = tmp_path / "state.json"
    versions = {str(digit) * 100_000 for digit in range(4)}
    storage.write_text(path, "0" * 100_000)
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for version in sorted(versions):
            storage.write_text(path, version)
    done.set()
    reader.join()
    assert seen <= versions
    assert os.listdir(tmp_path) == ["state.json"]


def test_refused_write_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "log"
    storage.write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=f"^cannot write {path}: .*File too large"):
            storage.write_bytes(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log"]


def test_new_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        storage.write_text(tmp_path / "file", "")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_missing_file_is_one_line(root):
    path = storage.join(root, "none")
    with pytest.raises(InputError) as refusal:
        storage.read_text(path)
    assert str(refusal.value).startswith(f"cannot read {path}: ")
    assert "\n" not in str(refusal.value)


def test_missing_bucket_is_one_line(monkeypatch):
    object_store.new_bucket(monkeypatch)
    with pytest.raises(InputError) as refusal:
        storage.check_writable("s3://no-such-bucket-here/run")
    message = str(refusal.value)
    assert message.startswith("cannot write s3://no-such-bucket-here/run/.write-probe-")
    bucket_at = f"the bucket exists at {os.environ['AWS_ENDPOINT_URL']}"
    assert message.endswith(f"fix: check that {bucket_at} and that credentials for it are set")
    assert "\n" not in message


def test_check_writable_leaves_nothing(root):
    storage.check_writable(root)
    assert storage.list_dir(root) == []


def test_check_writable_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="^cannot make directory "):
        storage.check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")]
)
def test_missing_package_names_the_extra(url, package, extra):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    script = f"""
import sys
sys.modules[{package!r}] = None
from mosaicjax import errors, storage
try:
    storage.exists({url!r})
except errors.InputError as refusal:
    print(refusal)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{url} needs a package that is missing: ")
    assert run.stdout.endswith(f"fix: pip install 'mosaicjax[{extra}]'\n")


def test_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="^no file system is known for wxyz://a/b; expected a local path"):
        storage.exists("wxyz://a/b")
    with pytest.raises(InputError, match="^TensorStore cannot reach http://a/b"):
        storage.tensorstore_spec("http://a/b")
    with pytest.raises(InputError, match="^s3:///x names no bucket; expected s3://bucket/path"):
        storage.tensorstore_spec("s3:///x")


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, {}),
        ({"AWS_REGION": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"AWS_ENDPOINT_URL": "http://h:1"}, {"endpoint": "http://h:1", "aws_region": "us-east-1"}),
        (
            {
                "AWS_ENDPOINT_URL": "http://h:1",
                "AWS_ENDPOINT_URL_S3": "http://h:2",
                "AWS_DEFAULT_REGION": "r",
            },
            {"endpoint": "http://h:2", "aws_region": "r"},
        ),
        ({"AWS_ACCESS_KEY_ID": "k"}, {"aws_credentials": {"type": "environment"}}),
    ],
)
def test_tensorstore_spec_of_s3_follows_the_environment(environment, added, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert storage.tensorstore_spec("s3://b/k/x") == {"driver": "s3", "bucket": "b", "path": "k/x"} | added


def test_tensorstore_spec_of_other_places(tmp_path):
    assert storage.tensorstore_spec("gs://b/k") == {"driver": "gcs", "bucket": "b", "path": "k"}
    assert storage.tensorstore_spec(tmp_path / "x") == {"driver": "file", "path": str(tmp_path / "x")}


def test_tensorstore_writes_where_storage_reads(root):
    path = storage.join(root, "array")
    spec = {
        "driver": "zarr3",
        "kvstore": storage.tensorstore_spec(path),
        "metadata": {"shape": [5], "data_type": "uint8", "codecs": ["bytes"]},
    }
    ts.open(spec, create=True).result()[...] = np.arange(1, 6, dtype=np.uint8)
    assert content(storage.join(path, "c", "0")) == bytes([1, 2, 3, 4, 5])
    assert storage.list_dir(path) == ["c", "zarr.json"]
