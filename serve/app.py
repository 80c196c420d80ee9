"""OpenAI's routes, and the application with all others round them.

`make_app` is told all it needs; nothing here loads a model or opens a socket.
"""

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from babyllama.errors import ConfigError
from serve.answers import Asked, EventStream, answer_titles, titled_text, unless_gone, whole
from serve.engine import Engine, Job
from serve.guard import Gate, GateConfig
from serve.page_routes import Service, add_page, model_facts
from serve.prompt import Prompt, chat_prompt, text_prompts
from serve.schema import (
    Answer,
    ChatRequest,
    CompletionRequest,
    Refusal,
    Refused,
    Request,
    invalid,
    refusal,
)

logger = logging.getLogger("babyllama.serve")

WORDS = {
    400: "refused", 401: "no key", 403: "another site", 404: "unknown", 405: "wrong method",
    408: "too slow", 413: "too large", 429: "busy", 500: "a fault", 503: "overloaded",
}  # fmt: skip


def make_app(service: Service, gate: GateConfig) -> Gate:
    """The application behind its gate."""
    app = FastAPI(
        title="babyllama", version="1", docs_url=None, redoc_url=None, lifespan=_lifespan(service),
        responses={status: {"model": Refusal, "description": text}
                   for status, text in WORDS.items()},
    )  # fmt: skip
    _add_errors(app)
    _add_replies(app, service)
    add_page(app, service)
    _leave_out_422(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Gate(app, gate, service.metrics, paths)


def _lifespan(service: Service) -> Callable:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_OncePerMinute())
        service.desk.start(loop)
        yield
        service.desk.stop()

    return lifespan


class _OncePerMinute:
    """Says what went wrong in the loop; that no file is left to open, which happens again at each
    connection that waits, once a minute."""

    def __init__(self) -> None:
        self.silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        if getattr(context.get("exception"), "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self.silent_until:
            self.silent_until = time.monotonic() + 60
            logger.error("no file is left to open: new connections wait (ulimit -n)")


def _leave_out_422(app: FastAPI) -> None:
    """FastAPI describes an answer that we never give: ours is 400."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: HttpRequest, error: Refused) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: HttpRequest, error: RequestValidationError) -> Response:
        refused = invalid(error.errors(), error.body)
        kind = request.headers.get("content-type", "")
        if request.method == "POST" and "json" not in kind:
            text = f"wanted the header Content-Type: application/json, found {kind or 'none'}"
            refused = Refused(400, text, code="wrong_content_type")
        return JSONResponse(refused.body, refused.status)

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        code = "unknown_url" if error.status_code in (404, 405) else None
        text = _no_route(request.method, request.url.path, app) if code else str(error.detail)
        return JSONResponse(
            refusal(error.status_code, text, None, code), error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def bug(request: HttpRequest, error: Exception) -> Response:
        return JSONResponse(refusal(500, "a fault of the server; see its log"), 500)


def _no_route(method: str, path: str, app: FastAPI) -> str:
    """What there is instead of a path that is not there."""
    ways = {
        route.path: route.methods for route in app.routes if getattr(route, "include_in_schema", 0)
    }
    if path in ways:
        return f"{method} {path}: wanted {' or '.join(sorted(ways[path]))}"
    meant = f"/v1/{path.rsplit('/v1/', 1)[-1].strip('/')}"
    if meant in ways:
        return f"no such path {path}; the base URL ends with /v1: {meant}"
    known = ", ".join(f"{' '.join(ways[path])} {path}" for path in sorted(ways) if "/v1/" in path)
    return f"no such path {method} {path}; this server has {known}"


# A reply is one JSON object; with "stream" it is events that each hold one, then [DONE].
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
REPLY = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


def _add_replies(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict:
        """The models that may be named in a request: the base first, then its adapters."""
        return {
            "object": "list",
            "data": [model_facts(service, name) for name in service.desk.engines],
        }

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        return model_facts(service, _choose(service, name)[0])

    @app.post("/v1/chat/completions", response_model=Answer, responses=REPLY)
    async def chat(body: ChatRequest, request: HttpRequest) -> object:
        """Continue a dialogue, or give a text its title."""
        name, engine = _choose(service, body.model)
        if body.task == "title":
            if service.served.eyes:
                raise Refused(400, "task: this model answers about images alone", "task")
            text = titled_text(body)
            with service.desk.places(_client(request), 1):
                async with service.searching:
                    return await answer_titles(body, text, engine, name)
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        with ExitStack() as places:
            places.enter_context(service.desk.places(_client(request), body.n or 1))
            prompt = await asyncio.to_thread(
                chat_prompt, body, engine.tokenizer, engine.context, service.retriever,
                service.truncate, service.served.eyes,
            )  # fmt: skip
            extra: dict = {}
            if prompt.n_dropped:
                extra["dropped_messages"] = prompt.n_dropped
            if prompt.sources is not None:
                extra["sources"] = prompt.sources
            jobs = _jobs(service, engine, body, [prompt], n_top)
            asked = Asked(service.desk, engine, jobs, name, True, service.metrics, extra,
                          _wants_usage(body))  # fmt: skip
            return await _answer(asked, body, request, places.pop_all())

    @app.post("/v1/completions", response_model=Answer, responses=REPLY)
    async def complete(body: CompletionRequest, request: HttpRequest) -> object:
        """Continue a text."""
        name, engine = _choose(service, body.model)
        if service.served.eyes:
            text = "this model answers questions about images; ask it by /v1/chat/completions"
            raise Refused(400, text, "prompt")
        n = (body.n or 1) * len(body.prompt)
        with ExitStack() as places:
            places.enter_context(service.desk.places(_client(request), n))
            prompts = await asyncio.to_thread(text_prompts, body, engine.tokenizer, engine.context)
            jobs = _jobs(service, engine, body, prompts, body.logprobs)
            asked = Asked(service.desk, engine, jobs, name, False, service.metrics, {},
                          _wants_usage(body))  # fmt: skip
            return await _answer(asked, body, request, places.pop_all())


async def _answer(asked: Asked, body: Request, request: HttpRequest, places: ExitStack) -> object:
    if body.stream:
        return EventStream(asked, places)
    with places:
        written = await unless_gone(whole(asked), request.receive)
    return JSONResponse(written.result()) if written else Response(status_code=499)  # nobody reads


def _wants_usage(body: Request) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _client(request: HttpRequest) -> str:
    return request.client.host if request.client else ""


def _choose(service: Service, name: str | None) -> tuple[str, Engine]:
    """The engine that a request names; the base model if it names none."""
    engines = service.desk.engines
    if name is None:
        return next(iter(engines.items()))
    if name not in engines:
        text = f"model {name!r} is not here; there is {', '.join(engines)}"
        raise Refused(404, text, "model", "model_not_found")
    return name, engines[name]


def _jobs(
    service: Service, engine: Engine, body: Request, prompts: list[Prompt], n_top: int | None
) -> list[Job]:
    try:
        sampling = body.sampling(engine.context)
    except ConfigError as error:  # a combination that no single field shows
        raise Refused(400, str(error)) from None
    deadline = time.monotonic() + service.reply_s
    return [
        Job(prompt.ids, sampling, lambda piece: None, number, n_top, deadline,
            picture=prompt.picture)
        for prompt in prompts
        for number in range(body.n or 1)
    ]  # fmt: skip
