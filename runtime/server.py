"""moe-run serve: the APIs of others over one engine, and a page to talk to it.

Every handler follows one way: the body is read against the API's form, the prompt is made in a worker thread, the
request waits its turn, and events become a response or a stream. A client that goes away, while it waits or in the
middle of an answer, cancels its job. Every error has the shape of the API it belongs to.

    app = create_app(Service(engine, "demo"), Policy())
    serve(app, open_socket("127.0.0.1", 8080))
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime import anthropic_api, openai_api
from moepack.runtime.completion import Completion, CompletionRequest, Failure
from moepack.runtime.guard import Guard, PatientProtocol, Policy, Receive, Scope, Send, describe_error
from moepack.runtime.scheduler import Cancelled, OutOfTime, QueueFull
from moepack.runtime.service import Service

BACKLOG = 1024
CLOSED_REQUEST = 499  # what proxies log for a client that went away; nobody receives it
Form = TypeVar("Form", bound=BaseModel)


class EventStream(Response):
    """Server-sent events of a completion. The client's going away cancels it."""

    media_type = "text/event-stream"

    def __init__(self, completion: Completion, events: AsyncIterator[str]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._completion, self._events = completion, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        gone.add_done_callback(lambda _: self._completion.cancel())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # a send to a client that is gone
            pass
        finally:
            gone.cancel()
            self._completion.cancel()


def create_app(service: Service, policy: Policy = Policy()) -> FastAPI:
    """The application. It closes the service when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="moepack", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, policy=policy)
    app.add_exception_handler(Exception, _handle_error)
    app.add_exception_handler(MoepackError, _handle_error)
    app.add_exception_handler(HTTPException, _handle_error)
    _add_openai(app, service)
    _add_anthropic(app, service)
    _add_views(app, service)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **_form(openai_api.ChatRequest))
    async def chat(request: Request) -> Response:
        form, completion = await _start(service, request, openai_api.ChatRequest, openai_api.prepare_chat)
        if form.stream:
            return EventStream(completion, openai_api.stream_chat(service, completion, form))
        return await _answer(service, request, completion, openai_api.answer_chat)

    @app.post("/v1/completions", **_form(openai_api.TextRequest))
    async def text(request: Request) -> Response:
        form, completion = await _start(service, request, openai_api.TextRequest, openai_api.prepare_text)
        if form.stream:
            return EventStream(completion, openai_api.stream_text(service, completion, form))
        return await _answer(service, request, completion, openai_api.answer_text)

    def describe_model() -> dict[str, Any]:
        facts = {"id": service.name, "object": "model", "created": service.created, "owned_by": "moepack"}
        return {**facts, "max_model_len": service.engine.max_context}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [describe_model()]})

    @app.get("/v1/models/{name:path}", responses={404: {"description": "There is no such model."}})
    async def model(name: str) -> Response:
        if name != service.name:
            raise HTTPException(404, f"there is no model {name[:80]!r}, this server has {service.name!r}")
        return JSONResponse(describe_model())


def _add_anthropic(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages", **_form(anthropic_api.MessagesRequest))
    async def messages(request: Request) -> Response:
        form, completion = await _start(service, request, anthropic_api.MessagesRequest, anthropic_api.prepare_messages)
        if form.stream:
            return EventStream(completion, anthropic_api.stream_messages(service, completion))
        return await _answer(service, request, completion, anthropic_api.answer_messages)

    @app.post("/v1/messages/count_tokens", **_form(anthropic_api.TokensRequest))
    async def count_tokens(request: Request) -> Response:
        form = _read_form(await request.body(), anthropic_api.TokensRequest)
        return JSONResponse(await asyncio.to_thread(anthropic_api.count_tokens, service, form))


def _add_views(app: FastAPI, service: Service) -> None:
    page = files("moepack.runtime").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(service.metrics.snapshot())

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY, "x-frame-options": "DENY"})


PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"{host}:{port}: {error.strerror or error}: choose another --host or --port") from None
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until the process is told to stop; a line about each goes to stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("moepack.serve").setLevel(logging.INFO)
    create_server(app).run(sockets=[listener])


def create_server(app: FastAPI) -> uvicorn.Server:
    """The HTTP server, not started."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=5,
            backlog=BACKLOG,
            limit_concurrency=BACKLOG,
        )
    )


# A request's way


def _read_form(body: bytes, form: type[Form]) -> Form:
    """The body as what the API takes. Raises UsageError with the first thing that is wrong."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"the body must be a JSON object, found {type(value).__name__}")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise UsageError(f"{where}: {first['msg']}") from None


async def _start(
    service: Service,
    request: Request,
    form: type[Form],
    prepare: Callable[[Service, Form, str], CompletionRequest],
) -> tuple[Form, Completion]:
    """Read the body, make the prompt beside the event loop, then queue the request."""
    wanted = _read_form(await request.body(), form)
    key = request.headers.get("authorization") or request.headers.get("x-api-key")
    client = key or (request.client.host if request.client else "")
    try:
        prepared = await asyncio.to_thread(prepare, service, wanted, client)
        completion = service.start(prepared)
    except MoepackError:
        service.metrics.requests.labels("refused").inc()
        raise
    return wanted, completion


async def _answer(
    service: Service, request: Request, completion: Completion, make: Callable[[Service, Completion], Awaitable[Any]]
) -> Response:
    """The whole answer as JSON; the client's going away cancels it."""
    gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    gone.add_done_callback(lambda _: completion.cancel())
    try:
        return JSONResponse(await make(service, completion))
    except Cancelled as error:
        service.note(completion, Failure(error))
        return Response(status_code=CLOSED_REQUEST)
    except Exception as error:
        service.note(completion, Failure(error))
        raise
    finally:
        gone.cancel()
        completion.cancel()


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _handle_error(request: Request, error: Exception) -> Response:
    """Any exception as the API's own error."""
    param = code = None
    if isinstance(error, HTTPException):
        status, reason = error.status_code, str(error.detail)
        if status == 405:
            reason = f"{request.method} is not possible here"
    elif isinstance(error, QueueFull):
        status, reason, code = 429, str(error), "queue_full"
    elif isinstance(error, OutOfTime):
        status, reason, code = 408, str(error), "timeout"
    elif isinstance(error, UsageError):
        status, reason = 400, str(error)
        param = _find_param(reason)
        code = "context_length_exceeded" if reason.startswith("the prompt has") else None
    elif isinstance(error, MoepackError):
        status, reason = 500, str(error)
    else:
        status, reason = 500, "the server failed: its log says more"
    headers = {"retry-after": "5"} if status == 429 else getattr(error, "headers", None)
    return JSONResponse(describe_error(request.url.path, status, reason, param, code), status, headers)


def _find_param(reason: str) -> str | None:
    """The parameter that an error message begins with."""
    first = reason.split(maxsplit=1)[0].rstrip(":").split("[")[0].split(".")[0]
    known = openai_api.ChatRequest.model_fields.keys() | openai_api.TextRequest.model_fields.keys()
    return first if first in known else None


# What /openapi.json says


def _form(form: type[BaseModel]) -> dict[str, Any]:
    """The body of a handler that reads it itself, and the errors it may answer with."""
    content = {"application/json": {"schema": form.model_json_schema(ref_template="#/components/schemas/{model}")}}
    statuses = {400: "Something in it is wrong.", 408: "It takes too long.", 413: "It is too large."}
    statuses |= {429: "Too many requests wait.", 500: "The server failed."}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {status: {"description": text} for status, text in statuses.items()},
    }


def _describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI without the answers that FastAPI would give and we do not."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", routes=app.routes)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = schema
    return app.openapi_schema
