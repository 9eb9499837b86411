"""The routes of the inference API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from importlib import metadata, resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mosaicjax.serve.answers import Json, Written, usage
from mosaicjax.serve.bodies import Body, ChatBody, CompletionBody, PredictBody, parsed
from mosaicjax.serve.exchange import Exchange
from mosaicjax.serve.limits import check_named
from mosaicjax.serve.metrics import CONTENT_TYPE, Metrics
from mosaicjax.serve.problems import Gone, Problem, fault
from mosaicjax.serve.service import Plan, Service

PAGE = "chat.html"
SCHEMAS = "#/components/schemas/{model}"
GONE = 499
"""The status that the log has of a client that went away: nginx' number."""
POLICY = "default-src 'self' 'unsafe-inline' data:"
"""The page loads nothing from elsewhere."""

log = logging.getLogger("mosaicjax.serve")

Kind = TypeVar("Kind", bound=Body)


class Api(FastAPI):
    """The application, which describes the bodies that its routes read themselves."""

    def openapi(self) -> dict[str, Any]:
        """See `FastAPI.openapi`."""
        if not self.openapi_schema:
            made = get_openapi(title=self.title, version=self.version, routes=self.routes)
            kinds = [(kind, "validation") for kind in (CompletionBody, ChatBody, PredictBody)]
            _, schemas = models_json_schema(kinds, ref_template=SCHEMAS)  # type: ignore[arg-type]
            made.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            self.openapi_schema = made
        return self.openapi_schema


def make_app(service: Service) -> ASGIApp:
    """The application of a service; it answers once the service's driver has been started."""
    routes = _Routes(service)
    api = Api(title="mosaicjax", version=metadata.version("mosaicjax"), docs_url=None, redoc_url=None)
    for path, run, body in (
        ("/v1/completions", routes.completions, CompletionBody),
        ("/v1/chat/completions", routes.chats, ChatBody),
        ("/predict", routes.predict, PredictBody),
    ):
        schema = {"$ref": SCHEMAS.format(model=body.__name__)}
        described = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        api.add_api_route(path, run, methods=["POST"], openapi_extra=described, response_model=None)
    for path, get in (
        ("/v1/models", routes.models),
        ("/v1/models/{name:path}", routes.model),
        ("/health", routes.health),
        ("/ready", routes.ready),
        ("/metrics", routes.metrics),
    ):
        api.add_api_route(path, get, methods=["GET"], response_model=None)
    api.add_api_route("/", routes.page, methods=["GET"], response_model=None, include_in_schema=False)
    api.add_exception_handler(Problem, _problem)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Gone, _gone)
    api.add_exception_handler(Exception, _fault)
    return _Watched(api, service.metrics)


class _Routes:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def completions(self, request: Request) -> Response:
        """Go on with prompts, as OpenAI's completions."""
        return await self._answer(request, CompletionBody, self.service.completion)

    async def chats(self, request: Request) -> Response:
        """The next turn of a conversation, as OpenAI's chat completions."""
        return await self._answer(request, ChatBody, self.service.chat)

    async def predict(self, request: Request) -> Response:
        """Go on with inputs, in MosaicML's shape."""
        return await self._answer(request, PredictBody, self.service.predict)

    async def models(self, request: Request) -> Response:
        """The model that is served, as a list."""
        self._key(request)
        return JSONResponse({"object": "list", "data": [self.service.model()]})

    async def model(self, request: Request, name: str) -> Response:
        """The model by its name."""
        self._key(request)
        self.service.check_model(name)
        return JSONResponse(self.service.model())

    async def health(self) -> Response:
        """Whether the process and its engine are alive."""
        healthy = self.service.driver.healthy
        return PlainTextResponse("ok" if healthy else "the engine has failed", 200 if healthy else 503)

    async def ready(self) -> Response:
        """Whether requests are taken: the engine is warm, and the server not about to stop."""
        self.service.driver.check_ready()
        if self.service.in_flight.draining:
            return PlainTextResponse("stopping", 503)
        return PlainTextResponse("ready")

    async def metrics(self, request: Request) -> Response:
        """Figures, for Prometheus."""
        self._key(request)
        return Response(self.service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def page(self) -> Response:
        """A page to chat with the model."""
        page = resources.files("mosaicjax.serve") / PAGE
        if not page.is_file():
            raise HTTPException(404)
        return HTMLResponse(page.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    def _key(self, request: Request) -> int | None:
        if not len(self.service.keys):
            check_named(request.headers.get("host"))
        return self.service.keys.number(request.headers.get("authorization"))

    async def _answer(self, request: Request, kind: type[Kind], plan_of: Callable[[Kind], Plan]) -> Response:
        service = self.service
        arrived = service.metrics.clock()
        key = self._key(request)
        service.driver.check_ready()
        with ExitStack() as stack:
            held = stack.enter_context(service.in_flight.hold(key))
            body = parsed(kind, await _read(request, service))
            # Long prompts take their time to become tokens, and streams are not to wait for it.
            plan = await asyncio.to_thread(plan_of, body)
            held.grow(len(plan.asked))
            if service.log_prompts:
                log.info("prompt %s", json.dumps(plan.text, ensure_ascii=False))
            exchange = stack.enter_context(
                Exchange(
                    service.driver,
                    service.metrics,
                    plan.asked,
                    request.receive,
                    arrived=arrived,
                    seconds=service.limits.request_seconds,
                )
            )
            if plan.stream:
                return _Events(_events(plan, exchange), stack.pop_all(), service.metrics)
            return JSONResponse(await _whole(plan, exchange))


async def _read(request: Request, service: Service) -> bytes:
    """A request's body.

    Raises:
        Problem: 413, 415, or 408, the client takes too long.
    """
    limits = service.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # What a page of another host can send without asking first is of other types.
    if kind != "application/json":
        raise Problem(415, "expected the Content-Type application/json", code="unsupported_media_type")
    large = Problem(413, f"a body has at most {limits.body_bytes} bytes here", code="body_too_large")
    declared = request.headers.get("content-length", "")
    digits = len(str(limits.body_bytes))
    if declared.isdecimal() and (len(declared) > digits or int(declared) > limits.body_bytes):
        raise large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                data += part
                if len(data) > limits.body_bytes:
                    raise large
    except TimeoutError as error:
        message = f"the body did not come within {limits.read_seconds} s"
        raise Problem(408, message, code="timeout", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise Gone from error
    return bytes(data)


async def _whole(plan: Plan, exchange: Exchange) -> Json:
    written = [Written() for _ in plan.asked]
    while not exchange.ended:
        for number, piece in await exchange.news():
            written[number].add(piece)
    if plan.shape is None:
        return {"outputs": [each.text for each in written]}
    return plan.shape.whole(written, usage(plan.prompt_tokens, sum(len(each.tokens) for each in written)))


async def _events(plan: Plan, exchange: Exchange) -> AsyncIterator[bytes]:
    """The chunks as they come, what was used if that was asked for, and the end; or what broke."""
    shape = plan.shape
    assert shape is not None
    tokens = 0
    try:
        yield b"".join(_event(chunk) for number in range(len(plan.asked)) for chunk in shape.begin(number))
        while not exchange.ended:
            pieces = await exchange.news()
            tokens += sum(len(piece.tokens) for _, piece in pieces)
            data = [_event(chunk) for number, piece in pieces for chunk in shape.chunks(number, piece)]
            if data:
                yield b"".join(data)
    except Problem as problem:
        yield _event(problem.body)
        return
    last = [shape.used(usage(plan.prompt_tokens, tokens))] if plan.with_usage else []
    yield b"".join([*map(_event, last), b"data: [DONE]\n\n"])


def _event(chunk: Json) -> bytes:
    # Escaped, for clients that end a line at other characters than the standard says.
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


class _Events(StreamingResponse):
    """Server-sent events; what was entered for them is left at their end, however that comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stack: ExitStack, metrics: Metrics) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._stack, self._metrics = stack, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; the exchange is what hears of the client's going."""
        with self._stack:
            try:
                await self.stream_response(send)
            except Gone:
                self._metrics.gone += 1


class _Watched:
    """Counts and logs every answer; of its request nothing but method and path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._metrics.clock(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            if status == GONE:
                self._metrics.gone += 1
            else:
                self._metrics.response(status or 500)
            seconds = self._metrics.clock() - began
            log.info("%s %r %d %.3f s", scope["method"], scope["path"], status, seconds)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return await _problem(request, Problem(error.status_code, what, headers=error.headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _fault(request: Request, error: Exception) -> Response:
    return await _problem(request, fault("something broke here; the server's log has it"))
