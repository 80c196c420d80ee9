"""OpenAI's routes, and the application with all others round them.

`make_app` is told all it needs; nothing here loads a model or opens a socket.
"""

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve import schema
from serve.answers import EventStream, Replies, titled_text, titles, unless_gone, whole
from serve.engine import Job
from serve.guard import Gate
from serve.models import Model
from serve.page_routes import Service, add_page
from serve.prompt import Prompt, chat_prompt, text_prompts

logger = logging.getLogger("babyllama.serve")


def make_app(service: Service, key: str = "") -> Gate:
    """The application behind its gate, which asks for the key, if there is one."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_OncePerMinute())
        service.desk.start(loop)
        yield
        service.desk.stop()

    app = FastAPI(
        title="babyllama", version="1", docs_url=None, redoc_url=None, lifespan=lifespan,
        responses=schema.REFUSALS,
    )  # fmt: skip
    _add_errors(app)
    _add_replies(app, service)
    add_page(app, service)
    return Gate(app, service.cfg, key)


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


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(schema.Refused)
    async def refused(_: HttpRequest, error: schema.Refused) -> Response:
        return error.answer

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: HttpRequest, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if request.method == "POST" and "json" not in kind:
            text = f"wanted the header Content-Type: application/json, found {kind or 'none'}"
            return schema.Refused(400, text, code="wrong_content_type").answer
        return schema.invalid(error.errors()).answer

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        code = "unknown_url" if error.status_code in (404, 405) else None
        text = _no_route(request.method, request.url.path, app) if code else str(error.detail)
        return schema.Refused(error.status_code, text, None, code, error.headers).answer

    @app.exception_handler(Exception)
    async def bug(request: HttpRequest, error: Exception) -> Response:
        return schema.Refused(500, "a fault of the server; see its log").answer


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


def _add_replies(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict:
        """The models that may be named in a request: the base first, then its adapters."""
        return {"object": "list", "data": [model.facts() for model in service.models.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        return service.model(name).facts()

    @app.post("/v1/chat/completions", responses=schema.REPLY)
    async def chat(body: schema.ChatRequest, request: HttpRequest) -> object:
        """Continue a dialogue, or give a text its title."""
        model, client = service.model(body.model), _client(request)
        if body.task == "title":
            if model.eyes:
                raise schema.bad("task", "this model answers about images alone")
            text = titled_text(body)
            with service.desk.places(client, 1) as places:
                async with service.searching:
                    asked = await asyncio.to_thread(titles, body, model, text, service.desk.metrics)
                return await _answer(asked, request, places)
        with service.desk.places(client, body.n or 1) as places:
            prompt = await asyncio.to_thread(
                chat_prompt, body, model.engine.tokenizer, model.engine.context,
                service.retriever, service.cfg.truncate, model.eyes,
            )  # fmt: skip
            asked = _replies(service, model, body, [prompt])
            return await _answer(asked, request, places)

    @app.post("/v1/completions", responses=schema.REPLY)
    async def complete(body: schema.CompletionRequest, request: HttpRequest) -> object:
        """Continue a text."""
        model = service.model(body.model)
        if model.eyes:
            text = "this model answers questions about images; ask it by /v1/chat/completions"
            raise schema.bad("prompt", text)
        with service.desk.places(_client(request), (body.n or 1) * len(body.prompt)) as places:
            prompts = await asyncio.to_thread(
                text_prompts, body, model.engine.tokenizer, model.engine.context
            )
            asked = _replies(service, model, body, prompts)
            return await _answer(asked, request, places)


async def _answer(asked: Replies, request: HttpRequest, places: ExitStack) -> object:
    """The answer, whole or as events, which give back the places when they end."""
    if asked.body.stream:
        return EventStream(asked, places.pop_all())
    return JSONResponse(await unless_gone(whole(asked), request.receive))


def _client(request: HttpRequest) -> str:
    return request.client.host if request.client else ""


def _replies(
    service: Service, model: Model, body: schema.Request, prompts: list[Prompt]
) -> Replies:
    sampling, desk = body.sampling(model.engine.context), service.desk
    deadline = time.monotonic() + service.cfg.reply_seconds
    jobs = [
        Job(prompt.ids, sampling, lambda piece: None, number, deadline, image=prompt.image)
        for prompt in prompts
        for number in range(body.n or 1)
    ]
    submit = partial(desk.submit, model.engine, jobs)
    return Replies(body, model, jobs, prompts[0].extra, desk.metrics, submit)
