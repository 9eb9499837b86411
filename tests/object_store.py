"""A local S3 server for tests: one a process, a bucket a test."""

import functools
import itertools
import logging
import os

import boto3
import pytest
from moto.server import ThreadedMotoServer

_numbers = itertools.count()


@functools.cache
def _endpoint() -> str:
    # s3fs keeps the endpoint it first saw, so the server lives as long as the test process.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


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
