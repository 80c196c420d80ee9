"""Replies in OpenAI's form: whole, or as a stream of server-sent events; and titles in that form.

Titles (`task: "title"`) come from the search of the terminal and of scoring, which runs in a thread
of its own, one at a time; its decoder is the engine's, which any number of threads may use.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from babyllama.errors import ConfigError
from babyllama.sampling import SamplingConfig
from babyllama.scoring.summarise import suggest
from serve.engine import Job, Piece
from serve.models import Model
from serve.scheduler import Desk
from serve.schema import ChatRequest, Refused, Request, bad

# What OpenAI's clients know of the ways a reply ends; the exact one is in `end`.
FINISH = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length", "time": "length"}
KEEP_ALIVE_S = 10


class Asked:
    """One request under way, whose replies come in pieces; how they are written down.

    n: replies
    extra: what the answer says beside them
    include_usage: the events end with it
    """

    def __init__(self, body: Request, model: Model, n: int, extra: dict) -> None:
        self.body, self.model, self.n, self.extra = body, model, n, extra
        self.is_chat = isinstance(body, ChatRequest)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def choice(self, number: int, reason: str) -> dict:
        """A reply, or what a piece adds to it, but for the text."""
        end = {"end": reason} if reason else {}
        return {"index": number, "finish_reason": FINISH.get(reason), "logprobs": None, **end}

    def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """Pieces of all replies as they come; None when nothing came for a while.

        raises: Refused if a reply could not be written
        """
        raise NotImplementedError

    def usage(self) -> dict:
        raise NotImplementedError


class Replies(Asked):
    """Jobs of the engine."""

    def __init__(
        self, body: Request, model: Model, desk: Desk, jobs: list[Job], extra: dict
    ) -> None:
        super().__init__(body, model, len(jobs), extra)
        self.desk, self.metrics, self.jobs = desk, desk.metrics, jobs

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """Who stops listening cancels what is left."""
        left, mailbox = self.n, asyncio.Queue()
        self.desk.submit(self.model.engine, self.jobs, mailbox)
        try:
            while left:
                try:
                    # Not wait_for: before Python 3.12 it may swallow a cancellation.
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        number, piece = await mailbox.get()
                except TimeoutError:
                    yield None
                    continue
                if piece.reason:
                    left -= 1
                    self.metrics.replies.labels(piece.reason).inc()
                if piece.reason == "error":
                    text = "the model's numbers are not finite, or it stopped; see the server's log"
                    raise Refused(500, text, code="model_error")
                if piece.reason == "time" and not self.jobs[number].reply.ids:
                    text = "the server was too busy to begin a reply in time; try again in 5 s"
                    raise Refused(503, text, code="overloaded", headers={"Retry-After": "5"})
                yield number, piece
        finally:
            for job in self.jobs:
                job.cancelled = True
            usage = self.usage()
            known = usage["prompt_tokens_details"]["cached_tokens"]
            self.metrics.tokens.labels("known").inc(known)
            self.metrics.tokens.labels("read").inc(usage["prompt_tokens"] - known)
            self.metrics.tokens.labels("written").inc(usage["completion_tokens"])

    def usage(self) -> dict:
        """Tokens; a prompt counts once, however many replies it gets."""
        # Of several replies to a prompt, the first has read it.
        prompts = {id(job.prompt): job for job in reversed(self.jobs)}.values()
        n_prompt = sum(len(job.prompt) for job in prompts)
        n_reply = sum(len(job.reply.ids) for job in self.jobs)
        known = {"cached_tokens": sum(job.n_known for job in prompts)}
        return token_usage(n_prompt, n_reply) | {"prompt_tokens_details": known}


async def whole(asked: Asked) -> dict:
    """The answer to a request that does not stream; raises as Asked.pieces."""
    found = [Piece("")] * asked.n
    async with aclosing(asked.pieces()) as pieces:
        async for item in pieces:
            if item is not None:
                (number, new), old = item, found[item[0]]
                found[number] = Piece(old.text + new.text, new.reason)
    choices = []
    for number, piece in enumerate(found):
        message = {"message": {"role": "assistant", "content": piece.text}}
        said = message if asked.is_chat else {"text": piece.text}
        choices.append(asked.choice(number, piece.reason) | said)
    return {**asked.head, "choices": choices, "usage": asked.usage(), **asked.extra}


async def events(asked: Asked) -> AsyncGenerator[bytes, None]:
    """The answer to a request that streams, as server-sent events."""
    head = {**asked.head, "object": asked.head["object"] + ".chunk" * asked.is_chat}
    more = {"usage": None} if asked.include_usage else {}

    def chunk(number: int, piece: Piece, role: bool = False) -> dict:
        delta = {"role": "assistant"} if role else {}
        if piece.text or role:
            delta["content"] = piece.text
        choice = {"delta": delta} if asked.is_chat else {"text": piece.text}
        return {**head, "choices": [asked.choice(number, piece.reason) | choice], **more}

    for number in range(asked.n if asked.is_chat else 0):
        extra = {} if number else asked.extra
        yield event(chunk(number, Piece(""), role=True) | extra)
    try:
        async with aclosing(asked.pieces()) as pieces:
            async for item in pieces:
                yield event(chunk(*item)) if item else b": waiting\n\n"
    except Refused as refused:
        yield event(refused.body)
        return
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": asked.usage()})
    yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8") + b"\n\n"


async def unless_gone(work: Coroutine, receive: Receive) -> asyncio.Task | None:
    """The work, done; None where the client left before, which ends it."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        # The pieces' own clean-up must have run when the places are given back.
        await asyncio.gather(doing, leaving, return_exceptions=True)


class EventStream(StreamingResponse):
    """A response that stops writing replies as soon as the client leaves, and frees its places.

    places: closed at the end, however it comes
    """

    def __init__(self, asked: Asked, places: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events(asked), headers=headers, media_type="text/event-stream")
        self.places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.places:
            async with aclosing(self.body_iterator):
                await super().__call__(scope, receive, send)


MOST_TITLES = 4

# What the search sets itself, and what has no place beside it.
_TAKEN = {
    *SamplingConfig.__dataclass_fields__, "max_tokens", "max_completion_tokens", "reference",
    "retrieve", "truncate",
} - {"n"}  # fmt: skip


def titled_text(request: ChatRequest) -> str:
    """The text that wants a title.

    raises: Refused (400) if the request says more, or something that the search would not heed
    """
    message, n = request.messages[0], len(request.messages)
    for name in sorted(_TAKEN & request.model_fields_set):
        raise bad(name, "titles are found by a search with settings of its own; leave it out")
    if n > 1 or message.role != "user":
        raise bad("messages", f"task title wants one message, the user's text, found {n}")
    if not message.text.strip() or message.images:
        raise bad("messages.0", "wanted a text")
    if (request.n or 1) > MOST_TITLES:
        raise bad("n", f"wanted at most {MOST_TITLES} titles, found {request.n}")
    return message.text.strip()


class Titles(Asked):
    """Titles of a text, found when this is made: the best first."""

    def __init__(self, body: ChatRequest, model: Model, text: str) -> None:
        """raises: Refused (400) if the model's context is too short for any text"""
        tokenizer = model.engine.tokenizer
        try:
            found = suggest(model.engine.decoder, tokenizer, text, body.n or 1)
        except ConfigError as error:
            raise Refused(400, str(error), "messages", "context_length_exceeded") from None
        self.titles = found.titles or [""]
        self.n_prompt = len(tokenizer.encode(text[: found.n_read]))
        self.n_reply = sum(len(tokenizer.encode(title)) for title in self.titles)
        extra = {"read": {"characters": found.n_read, "of": len(text)}}
        super().__init__(body, model, len(self.titles), extra)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        for number, title in enumerate(self.titles):
            yield number, Piece(title, "eos")

    def usage(self) -> dict:
        return token_usage(self.n_prompt, self.n_reply)


def token_usage(n_prompt: int, n_reply: int) -> dict:
    total = n_prompt + n_reply
    return {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": total}
