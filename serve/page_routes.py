"""The page's files, and the routes that it asks: settings, model card, 资料; health and metrics."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route

from babyllama.config import shown
from babyllama.retrieval.retriever import Choices, Retriever, WikiError, look_up
from babyllama.run_dir import read_info
from serve import documents
from serve.models import Model, ServerConfig
from serve.scheduler import Desk
from serve.schema import Refused

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
}  # fmt: skip
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

    searching: held by the one request that searches titles
    """

    desk: Desk
    models: dict[str, Model]
    cfg: ServerConfig
    retriever: Retriever | None
    searching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    def model(self, name: str | None) -> Model:
        """The one that a request names; the base if it names none.

        raises: Refused (404)
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            text = f"model {name!r} is not here; there is {', '.join(self.models)}"
            raise Refused(404, text, "model", "model_not_found")
        return self.models[name]


def add_page(app: FastAPI, service: Service) -> None:
    for path, file in FILES.items():
        kind, headers = KINDS[file.suffix] + "; charset=utf-8", {"Cache-Control": "no-cache"}
        found = Response(file.read_bytes(), media_type=kind, headers=headers)
        app.routes.append(Route(path, found, methods=["GET"], include_in_schema=False))

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.desk.failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.desk.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/api/settings")
    async def settings() -> dict:
        """What the page needs to know to show itself."""
        return {
            "models": [model.facts() for model in service.models.values()],
            "retrieval": service.retriever.describe() if service.retriever else None,
            "look_up": bool(service.retriever or service.cfg.wiki_url),
        }

    @app.get("/api/card")
    async def card(model: Annotated[str, Query(max_length=200)]) -> dict:
        """What a model is, and the card that lies beside it, as Markdown."""
        return await asyncio.to_thread(_card, service.model(model))

    looking, reading = (asyncio.Semaphore(MOST_AT_A_TIME) for _ in range(2))

    @app.post("/api/text", include_in_schema=False)
    async def text(request: HttpRequest) -> dict:
        """The text of a PDF."""
        if reading.locked():
            raise Refused(429, "too many documents at a time", headers={"Retry-After": "5"})
        async with reading:
            text = await asyncio.to_thread(documents.text_of_pdf, await request.body())
            return {"text": text}

    @app.get("/api/wiki")
    async def wiki(term: Annotated[str, Query(min_length=1, max_length=200)]) -> dict:
        """A text for the 资料 box: from the index, else from Wikipedia's server."""
        if looking.locked():
            raise Refused(429, "too many look-ups at a time", headers={"Retry-After": "2"})
        async with looking:
            return await asyncio.to_thread(_look_up, service, term)


def _card(model: Model) -> dict:
    path, facts, config = model.path, model.facts(), model.engine.decoder.model.config
    info = read_info(model.stated)
    card = next((d / "README.md" for d in (path, path.parent) if (d / "README.md").is_file()), None)
    facts = {
        "path": shown(path), "kind": info["kind"], "tasks": facts["tasks"],
        "parameters": config.n_parameters, "vocabulary": config.vocab_size,
        "context": config.max_seq_len, "layers": config.n_layers, "dim": config.dim,
        "weights": model.engine.decoder.kind, "step": info["step"], "parent": info.get("parent"),
        "created": time.strftime("%Y-%m-%d", time.localtime(facts["created"])),
    }  # fmt: skip
    return {"facts": facts, "text": card.read_text("utf-8", "replace") if card else ""}


def _look_up(service: Service, term: str) -> dict:
    """An article, or titles to choose from; raises Refused (404) if there is neither."""
    if not term.strip():
        raise Refused(400, "term is blank", "term")
    if service.retriever:
        found = service.retriever.article(term, 2000)
        if found.text:
            return {"text": found.text, "citation": found.citation, "url": None}
    if not service.cfg.wiki_url:
        where = "the index has" if service.retriever else "this server has no index, and"
        raise Refused(404, f"{where} nothing about {term!r}", "term", "nothing_found")
    try:
        article = look_up(term, service.cfg.wiki_url)
    except WikiError as error:
        raise Refused(404, str(error), "term", "nothing_found") from None
    if isinstance(article, Choices):
        return {"choices": article.titles, "ambiguous": article.ambiguous}
    return {"text": article.text, "citation": f"《{article.title}》", "url": article.url}
