"""The page's files, and the routes that it asks: settings, model card, 资料; health and metrics."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from babyllama.config import shown
from babyllama.retrieval.retriever import Choices, Retriever, WikiError, look_up
from babyllama.run_dir import read_info
from serve import documents
from serve.models import Served
from serve.scheduler import Desk, Metrics
from serve.schema import Refused

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
FILES = {
    "/" + file.relative_to(PAGE).as_posix().removesuffix("index.html"): file
    for file in sorted(PAGE.rglob("*"))
    if file.suffix in KINDS
}
OPEN = frozenset([*FILES, "/health"])
LARGER = {"/api/text": documents.MOST_BYTES}
MOST_AT_A_TIME = 4  # look-ups, and documents


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    wiki_url: MediaWiki's API for look-ups on the network; "" for none
    searching: held by the one request that searches titles
    """

    desk: Desk
    metrics: Metrics
    served: Served
    reply_s: float
    truncate: bool
    retriever: Retriever | None
    wiki_url: str
    searching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


def model_facts(service: Service, name: str) -> dict:
    """A model in OpenAI's form, with what a client may want to know beside it."""
    return {
        "id": name,
        "object": "model",
        "created": service.served.created[name],
        "owned_by": "babyllama",
        "context": service.desk.engines[name].context,
        "pictures": service.served.eyes is not None,
        "tasks": service.served.tasks[name],
    }


def add_page(app: FastAPI, service: Service) -> None:
    for path, file in FILES.items():
        content, kind = file.read_bytes(), KINDS[file.suffix] + "; charset=utf-8"

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
            "models": [model_facts(service, name) for name in service.desk.engines],
            "retrieval": service.retriever.describe() if service.retriever else None,
            "look_up": bool(service.retriever or service.wiki_url),
        }

    @app.get("/api/card")
    async def card(model: Annotated[str, Query(max_length=200)]) -> dict:
        """What a model is, and the card that lies beside it, as Markdown."""
        if model not in service.served.paths:
            raise Refused(404, f"no such model {model!r}", "model", "model_not_found")
        return await asyncio.to_thread(_card, service.served, model)

    looking, reading = (asyncio.Semaphore(MOST_AT_A_TIME) for _ in range(2))

    @app.post("/api/text", include_in_schema=False)
    async def text(request: HttpRequest) -> dict:
        """The text of a PDF."""
        if reading.locked():
            raise Refused(429, "too many documents at a time", headers={"Retry-After": "5"})
        async with reading:
            return {"text": await documents.text_of_pdf(await request.body())}

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


def _card(served: Served, name: str) -> dict:
    path, model = served.paths[name], served.engines[name].decoder.model
    place = path if (path / "model.yaml").is_file() else next(iter(served.paths.values()))
    info, config = read_info(place), model.config
    card = next((d / "README.md" for d in (path, path.parent) if (d / "README.md").is_file()), None)
    facts = {
        "path": shown(path),
        "kind": info["kind"],
        "tasks": served.tasks[name],
        "parameters": config.n_parameters,
        "vocabulary": config.vocab_size,
        "context": config.max_seq_len,
        "layers": config.n_layers,
        "dim": config.dim,
        "weights": served.engines[name].decoder.kind,
        "step": info["step"],
        "parent": info.get("parent"),
        "created": time.strftime("%Y-%m-%d", time.localtime(served.created[name])),
    }
    return {"facts": facts, "text": card.read_text("utf-8", "replace") if card else ""}


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
