"""What is answered instead of a completion: a status, and an error in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mosaicjax.errors import InputError

INVALID = "invalid_request_error"
FAULT = "server_error"
RETRY_SECONDS = 1
"""After so long a request that found no place may come again."""

_SHOWN = 200


class Problem(Exception):
    """An answer that is an error; `param` names the field at fault, `code` the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


class Gone(Exception):
    """The client is not there any more."""


def full(what: str) -> Problem:
    """There are as many requests in flight as there may be."""
    return Problem(
        429,
        f"{what}; try again in {RETRY_SECONDS} s",
        code="rate_limit_exceeded",
        kind="requests",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def unready(why: str, code: str) -> Problem:
    """No request is taken now."""
    return Problem(503, why, code=code, kind=FAULT, headers={"Retry-After": str(RETRY_SECONDS)})


def fault(message: str) -> Problem:
    """Something of ours broke."""
    return Problem(500, message, code="internal_error", kind=FAULT)


def refused(error: InputError, param: str) -> Problem:
    """What the engine or the template refuses: of the field that its message begins with, or of `param`."""
    name = str(error).partition(";")[0]
    return Problem(400, str(error), param=name if name.isidentifier() else param)


def invalid(found: Mapping[str, Any]) -> Problem:
    """The first thing that pydantic has against a body."""
    where = ".".join(map(str, found["loc"]))[:_SHOWN]
    if found["type"] == "extra_forbidden":
        return Problem(
            400, f"{where} is not a field here, or not supported", param=where, code="unknown_parameter"
        )
    message = f"{where}: {found['msg']}" if where else f"the body: {found['msg']}"
    return Problem(400, message, param=where or None, code="invalid_value" if where else "invalid_json")
