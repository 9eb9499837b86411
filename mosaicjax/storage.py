"""Files and directories of a run, on this machine or anywhere fsspec reaches (`s3://`, `gs://`)."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mosaicjax.errors import InputError

# Which optional dependency of ours brings the fsspec file system of a URL scheme.
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}

_SEPARATOR = "://"
_COPY_BYTES = 8 * 2**20

PathLike = str | os.PathLike[str]


def scheme(path: PathLike) -> str:
    """The URL scheme of a path in lower case; `file` where there is none."""
    text = os.fspath(path)
    return text.split(_SEPARATOR, 1)[0].lower() if _SEPARATOR in text else "file"


def is_remote(path: PathLike) -> bool:
    """Whether a path lies outside the file systems mounted on this machine."""
    return scheme(path) != "file"


def local(path: PathLike) -> str:
    """An absolute path on this machine, without `file://`, `~` or a trailing slash."""
    assert not is_remote(path), path
    return os.path.abspath(os.path.expanduser(os.fspath(path).removeprefix("file" + _SEPARATOR)))


def join(path: PathLike, *parts: str) -> str:
    """A path below another; forward slashes on object stores, the system's own on this machine."""
    if is_remote(path):
        return posixpath.join(os.fspath(path).rstrip("/"), *parts)
    return os.path.join(os.fspath(path), *parts)


def exists(path: PathLike) -> bool:
    """Whether there is a file, a directory, or on an object store anything below the path.

    Raises:
        InputError: the store cannot be asked (no such bucket, no access, no connection).
    """
    with refusal("look at", path):
        if is_remote(path):
            return bool(_filesystem(path).exists(os.fspath(path)))
        return os.path.exists(local(path))


def read_bytes(path: PathLike) -> bytes:
    """The content of one file.

    Raises:
        InputError: it is missing or cannot be read.
    """
    with refusal("read", path):
        if is_remote(path):
            return bytes(_filesystem(path).cat_file(os.fspath(path)))
        with open(local(path), "rb") as file:
            return file.read()


def file_size(path: PathLike) -> int:
    """Units: bytes.

    Raises:
        InputError: it is missing or cannot be looked at.
    """
    with refusal("read", path):
        if is_remote(path):
            return int(_filesystem(path).size(os.fspath(path)))
        return os.path.getsize(local(path))


def read_range(path: PathLike, begin: int, end: int) -> bytes:
    """The bytes of one file from `begin` up to `end`; fewer where the file is shorter.

    Raises:
        InputError: it is missing or cannot be read.
    """
    with refusal("read", path):
        if is_remote(path):
            return bytes(_filesystem(path).cat_file(os.fspath(path), start=begin, end=end))
        with open(local(path), "rb") as file:
            file.seek(begin)
            return file.read(end - begin)


def read_text(path: PathLike) -> str:
    """The content of one UTF-8 file.

    Raises:
        InputError: it is missing or cannot be read.
    """
    return read_bytes(path).decode("utf-8")


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write one file so that a reader, or a crash, finds the old content or the new, never a part.

    Directories above it are made. An object store replaces an object in one put; on this machine a
    temporary neighbour is flushed to the disk and renamed over it.

    Raises:
        InputError: the store refuses.
    """
    with refusal("write", path):
        if is_remote(path):
            _filesystem(path).pipe_file(os.fspath(path), content)
        else:
            _replace_local(local(path), content)


def write_text(path: PathLike, text: str) -> None:
    """Write one UTF-8 file as `write_bytes` does.

    Raises:
        InputError: the store refuses.
    """
    write_bytes(path, text.encode("utf-8"))


def make_dirs(path: PathLike) -> None:
    """Make a directory and those above it; object stores have none, so there nothing happens.

    Raises:
        InputError: the file system refuses.
    """
    if not is_remote(path):
        with refusal("make directory", path):
            os.makedirs(local(path), exist_ok=True)


def list_dir(path: PathLike) -> list[str]:
    """Sorted names directly below a directory; empty where the directory does not exist.

    Raises:
        InputError: the store cannot be asked (no such bucket, no access, no connection).
    """
    with refusal("list", path):
        if not is_remote(path):
            target = local(path)
            return sorted(os.listdir(target)) if os.path.isdir(target) else []
        text = os.fspath(path).rstrip("/")
        try:
            entries = _filesystem(path).ls(text, detail=False)
        except FileNotFoundError:
            return []
        listed = {posixpath.basename(entry.rstrip("/")) for entry in entries}
        # Some stores list the object that stands for the directory itself, as an empty name.
        return sorted(listed - {"", posixpath.basename(text)})


def sizes(path: PathLike, names: Iterable[str]) -> dict[str, int]:
    """Units: bytes, of those of the files below a folder that are there; one listing on an object store.

    Raises:
        InputError: the store cannot be asked.
    """
    with refusal("list", path):
        if is_remote(path):
            filesystem = _filesystem(path)
            root = filesystem._strip_protocol(os.fspath(path)).rstrip("/") + "/"
            listed = filesystem.find(root, detail=True)
            found = {name.removeprefix(root): int(about["size"]) for name, about in listed.items()}
            return {name: found[name] for name in names if name in found}
        there = {name: join(local(path), name) for name in names}
        return {name: os.path.getsize(file) for name, file in there.items() if os.path.isfile(file)}


def find(path: PathLike) -> list[str]:
    """Names of all files below a folder of an object store, with slashes, relative to it and sorted.

    Raises:
        InputError: the store cannot be asked.
    """
    assert is_remote(path), path
    with refusal("list", path):
        filesystem = _filesystem(path)
        root = filesystem._strip_protocol(os.fspath(path)).rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in filesystem.find(root) if name != root)


def remove_tree(path: PathLike) -> None:
    """Remove a file or a directory with all below it; nothing happens where there is none.

    Raises:
        InputError: the store refuses.
    """
    with refusal("remove", path):
        if is_remote(path):
            filesystem = _filesystem(path)
            if filesystem.exists(os.fspath(path)):
                filesystem.rm(os.fspath(path), recursive=True)
            return
        target = local(path)
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        elif os.path.lexists(target):
            os.remove(target)


def copy_file(source: PathLike, target: PathLike) -> None:
    """Copy one file in pieces, from any store to any other; on this machine it appears whole or not at all.

    Raises:
        InputError: one of the two stores refuses.
    """
    with refusal("copy", source), contextlib.ExitStack() as files:
        incoming = files.enter_context(_open(source, "rb"))
        with refusal("write", target):
            if is_remote(target):
                with _open(target, "wb") as outgoing:
                    shutil.copyfileobj(incoming, outgoing, _COPY_BYTES)
            else:
                _replace_local(local(target), incoming)


@contextlib.contextmanager
def reading(path: PathLike) -> Iterator[IO[bytes]]:
    """A file to be read in pieces, anywhere in it.

    Raises:
        InputError: it is missing or cannot be read.
    """
    with refusal("read", path), _open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def appending(path: PathLike) -> Iterator[IO[bytes]]:
    """A new file to be written from its beginning to its end, on the disk once the block is left.

    Other than with `write_bytes`, a reader finds the part that is written so far.

    Raises:
        InputError: the store refuses.
    """
    with refusal("write", path):
        if not is_remote(path):
            os.makedirs(os.path.dirname(local(path)), exist_ok=True)
        with _open(path, "wb") as file:
            yield file
            file.flush()
            if not is_remote(path):
                os.fsync(file.fileno())


def check_writable(path: PathLike) -> None:
    """Write and remove a small file in a directory, so that a run is refused before it starts.

    Raises:
        InputError: the directory cannot be written to.
    """
    make_dirs(path)
    probe = join(path, f".write-probe-{os.getpid()}")
    write_text(probe, "")
    remove_tree(probe)


def s3_endpoint() -> str | None:
    """The S3 server that the environment names, as AWS clients read it; None is Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def tensorstore_spec(path: PathLike) -> dict[str, Any]:
    """The TensorStore key-value store at a path, as JSON.

    For S3 the endpoint is `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` and the region `AWS_REGION` or
    `AWS_DEFAULT_REGION`, as for every other AWS client; TensorStore itself reads neither.

    Raises:
        InputError: TensorStore has no driver for this kind of path, or it names no bucket.
    Source: https://google.github.io/tensorstore/kvstore/s3/index.html
    """
    kind = scheme(path)
    if kind == "file":
        return {"driver": "file", "path": local(path)}
    if kind not in EXTRAS:
        raise InputError(f"TensorStore cannot reach {path}", expected="a local path, gs:// or s3://")
    bucket, _, key = os.fspath(path).split(_SEPARATOR, 1)[1].partition("/")
    if not bucket:
        raise InputError(f"{path} names no bucket", expected=f"{kind}://bucket/path")
    if kind != "s3":
        return {"driver": "gcs", "bucket": bucket, "path": key}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = s3_endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        # A server other than Amazon's need not answer the request by which TensorStore finds the region.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Asked first in any case; naming it keeps TensorStore from complaining of absent profile files.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def forget_listings(path: PathLike) -> None:
    """Drop what fsspec remembers of a remote store, for libraries that share its default instance.

    Other processes write there too; a remembered listing would hide their files.
    """
    if is_remote(path):
        _import_filesystem(path)(scheme(path)).invalidate_cache()


def failures(path: PathLike) -> tuple[type[BaseException], ...]:
    """The exceptions by which the store of a path says no: missing, forbidden, full, out of reach.

    With ValueError among them: so TensorStore reports what a store refuses.
    """
    kinds: list[type[BaseException]] = [OSError, ValueError]
    if scheme(path) == "s3":
        from botocore.exceptions import BotoCoreError, ClientError

        kinds += [BotoCoreError, ClientError]
    elif scheme(path) in ("gs", "gcs"):
        from aiohttp import ClientError as ConnectionFailure
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        kinds += [ConnectionFailure, HttpError, GoogleAuthError]
    return tuple(kinds)


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, in one line of about `limit` characters; what is left out is the middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


@contextlib.contextmanager
def refusal(action: str, path: PathLike) -> Iterator[None]:
    """Turn a store's own exceptions into the one line a user reads.

    Raises:
        InputError: cannot do this at that path, and why.
    """
    try:
        yield
    except InputError:
        raise
    except failures(path) as error:
        hint = None
        if is_remote(path):
            endpoint = s3_endpoint()
            at = f" at {endpoint}" if scheme(path) == "s3" and endpoint else ""
            hint = f"check that the bucket exists{at} and that credentials for it are set"
        raise InputError(f"cannot {action} {os.fspath(path)}: {one_line(error)}", fix=hint) from error


def _import_filesystem(path: PathLike) -> Any:
    import fsspec

    kind = scheme(path)
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        fix = f"pip install 'mosaicjax[{EXTRAS[kind]}]'" if kind in EXTRAS else "install the package it names"
        raise InputError(f"{path} needs a package that is missing: {error}", fix=fix) from error
    except ValueError as error:
        raise InputError(
            f"no file system is known for {path}", expected="a local path, s3:// or gs://"
        ) from error
    return fsspec.filesystem


def _filesystem(path: PathLike) -> Any:
    options = {}
    if scheme(path) == "s3" and s3_endpoint():
        # fsspec keeps one instance for like options: an endpoint from the environment is not among them.
        options["endpoint_url"] = s3_endpoint()
    # Other processes write to the same place; a remembered listing would hide their files.
    return _import_filesystem(path)(scheme(path), use_listings_cache=False, **options)


def _open(path: PathLike, mode: str) -> Any:
    if is_remote(path):
        return _filesystem(path).open(os.fspath(path), mode)
    return open(local(path), mode)


def _replace_local(target: str, content: Any) -> None:
    """Write bytes, or all of an open file, beside the target and rename it over the target."""
    directory, name = os.path.split(target)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
