"""The routes: OpenAI's three, the page, health, metrics, and what the page asks for.

`make_app` is told all it needs; nothing here loads a model or opens a socket.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from babyllama.errors import ConfigError
from babyllama.retrieval.retriever import Choices, Retriever, WikiError, look_up
from serve.answers import Asked, EventStream, gone, whole
from serve.engine import Engine, Job
from serve.errors import Refused, invalid, refusal
from serve.guard import Gate, GateConfig
from serve.metrics import Metrics
from serve.prompt import Prompt, chat_prompt, text_prompts
from serve.scheduler import Desk
from serve.schema import Answer, ChatRequest, CompletionRequest, Refusal, Request

if TYPE_CHECKING:
    from serve.pictures import Eyes

logger = logging.getLogger("babyllama.serve")

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN = frozenset([*FILES, "/health"])
WORDS = {
    400: "refused", 401: "no key", 403: "another site", 404: "unknown", 405: "wrong method",
    408: "too slow", 413: "too large", 429: "busy", 500: "a fault", 503: "overloaded",
}  # fmt: skip
MOST_LOOK_UPS = 4


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    created: when the checkpoint was made, by model
    wiki_url: MediaWiki's API for look-ups on the network; "" for none
    eyes: of the model that is served, where it takes pictures
    """

    desk: Desk
    metrics: Metrics
    created: dict[str, int]
    reply_s: float
    truncate: bool
    retriever: Retriever | None
    wiki_url: str
    eyes: "Eyes | None" = None


def make_app(service: Service, gate: GateConfig) -> Gate:
    """The application behind its gate."""
    app = FastAPI(
        title="babyllama", version="1", docs_url=None, redoc_url=None, lifespan=_lifespan(service),
        responses={status: {"model": Refusal, "description": text}
                   for status, text in WORDS.items()},
    )  # fmt: skip
    _add_errors(app)
    _add_replies(app, service)
    _add_page(app, service)
    _leave_out_422(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Gate(app, gate, service.metrics, paths)


def _lifespan(service: Service) -> Callable:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.desk.start(asyncio.get_running_loop())
        yield
        service.desk.stop()

    return lifespan


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
        text, code = _no_route(request.method, request.url.path, app), "unknown_url"
        if error.status_code not in (404, 405):
            text, code = str(error.detail), None
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
        return {"object": "list", "data": [_model(service, name) for name in service.desk.engines]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        return _model(service, _choose(service, name)[0])

    @app.post("/v1/chat/completions", response_model=Answer, responses=REPLY)
    async def chat(body: ChatRequest, request: HttpRequest) -> object:
        """Continue a dialogue."""
        name, engine = _choose(service, body.model)
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        with ExitStack() as places:
            places.enter_context(service.desk.places(_client(request), body.n or 1))
            prompt = await asyncio.to_thread(
                chat_prompt, body, engine.tokenizer, engine.context, service.retriever,
                service.truncate, service.eyes,
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
        if service.eyes:
            text = "this model answers questions about pictures; ask it by /v1/chat/completions"
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
        writing = asyncio.create_task(whole(asked))
        leaving = asyncio.create_task(gone(request.receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(writing.result())
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)


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


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.created[name],
        "owned_by": "babyllama",
        "context": service.desk.engines[name].context,
        "pictures": service.eyes is not None,
    }


def _add_page(app: FastAPI, service: Service) -> None:
    for path, (name, kind) in FILES.items():
        content = (PAGE / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.add_api_route(path, _without_arguments(page), include_in_schema=False)

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.desk.failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/api/settings")
    async def settings() -> dict:
        """What the page needs to know to show itself."""
        return {
            "models": [_model(service, name) for name in service.desk.engines],
            "retrieval": service.retriever.describe() if service.retriever else None,
            "look_up": bool(service.retriever or service.wiki_url),
        }

    looking = asyncio.Semaphore(MOST_LOOK_UPS)

    @app.get("/api/wiki")
    async def wiki(term: Annotated[str, Query(min_length=1, max_length=200)]) -> dict:
        """A text for the 资料 box: from the index, else from Wikipedia's server."""
        if looking.locked():
            raise Refused(429, "too many look-ups at a time", headers={"Retry-After": "2"})
        async with looking:
            return await asyncio.to_thread(_look_up, service, term)


def _without_arguments(page: Callable) -> Callable:
    async def endpoint() -> Response:
        return page()

    return endpoint


def _look_up(service: Service, term: str) -> dict:
    """An article, or titles to choose from; raises Refused (404) if there is neither."""
    if not term.strip():
        raise Refused(400, "term is blank", "term")
    if service.retriever:
        found = service.retriever.article(term, 2000)
        if found.text:
            return {"text": found.text, "citation": found.citation, "url": None}
    if not service.wiki_url:
        where = "the index has" if service.retriever else "this server has no index, and"
        raise Refused(404, f"{where} nothing about {term!r}", "term", "nothing_found")
    try:
        article = look_up(term, service.wiki_url)
    except WikiError as error:
        raise Refused(404, str(error), "term", "nothing_found") from None
    if isinstance(article, Choices):
        return {"choices": article.titles, "ambiguous": article.ambiguous}
    return {"text": article.text, "citation": f"《{article.title}》", "url": article.url}
