"""A local S3 server for tests: one a process, a bucket a test."""

import contextlib
import functools
import itertools
import logging
import os
import urllib.request
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

_numbers = itertools.count()


_counting: list[list[str]] = []


def serve(port: int = 0) -> ThreadedMotoServer:
    """Start a server; what another of this process was given is here too."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


def stop(server: ThreadedMotoServer) -> None:
    """Let nobody in any more; connections under way are left to their end."""
    server.stop()
    server._server.server_close()


@functools.cache
def _endpoint() -> str:
    # s3fs keeps the endpoint it first saw, so the server lives as long as the test process.
    server = serve()
    app = server._server.app

    def counted(environ, start_response):
        for paths in _counting:
            paths.append(environ["PATH_INFO"])
        return app(environ, start_response)

    server._server.app = counted
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The paths of all requests for the time being."""
    paths: list[str] = []
    _counting.append(paths)
    yield paths
    _counting.remove(paths)


@contextlib.contextmanager
def keys_asked_for() -> Iterator[None]:
    """Refuse every key, as a server does that knows none, for the time being."""

    def allow_first(count: bytes) -> None:
        address = f"{_endpoint()}/moto-api/reset-auth"
        with urllib.request.urlopen(urllib.request.Request(address, count, {"Content-Type": "text/plain"})):
            pass

    allow_first(b"0")
    try:
        yield
    finally:
        allow_first(b"inf")


def new_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the AWS clients of this process and its children at the server; `s3://` and a new bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": _endpoint(),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{os.getpid()}-{next(_numbers)}"
    client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def client():
    """A boto3 client: what the tests look at objects with, instead of the code under test."""
    return boto3.client("s3")


def keys(url: str) -> list[str]:
    """All object keys below an `s3://bucket/prefix`."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
