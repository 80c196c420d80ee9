"""Replies in OpenAI's form: whole, or as a stream of server-sent events; and titles in that form.

Titles (`task: "title"`) come from the search of the terminal and of scoring, which runs in a thread
of its own, one at a time; its decoder is the engine's, which any number of threads may use.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from babyllama.decoder import Reply
from babyllama.errors import ConfigError
from babyllama.sampling import SamplingConfig
from babyllama.scoring.summarise import suggest
from serve.engine import Job, Piece
from serve.models import Model
from serve.scheduler import Mailbox, Metrics
from serve.schema import ChatRequest, Refused, Request, bad

# What OpenAI's clients know of the ways a reply ends; the exact one is in `end`.
FINISH = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length", "time": "length"}


class Replies:
    """One request under way, whose replies come in pieces; how they are written down.

    jobs: a reply each
    extra: what the answer says beside them
    submit: lets them begin, their pieces going to a mailbox
    include_usage: the events end with it
    """

    def __init__(
        self, body: Request, model: Model, jobs: list[Job], extra: dict, metrics: Metrics,
        submit: Callable[[Mailbox], None],
    ) -> None:  # fmt: skip
        self.body, self.jobs, self.extra = body, jobs, extra
        self.metrics, self.submit = metrics, submit
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

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all replies as they come; who stops listening cancels what is left.

        raises: Refused if a reply could not be written
        """
        left, mailbox = len(self.jobs), asyncio.Queue()
        self.submit(mailbox)
        try:
            while left:
                number, piece = await mailbox.get()
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
        return {
            "prompt_tokens": n_prompt, "completion_tokens": n_reply,
            "total_tokens": n_prompt + n_reply,
            "prompt_tokens_details": {"cached_tokens": sum(job.n_known for job in prompts)},
        }  # fmt: skip


async def whole(asked: Replies) -> dict:
    """The answer to a request that does not stream; raises as Replies.pieces."""
    found = [Piece("")] * len(asked.jobs)
    async with aclosing(asked.pieces()) as pieces:
        async for number, new in pieces:
            found[number] = Piece(found[number].text + new.text, new.reason)
    choices = []
    for number, piece in enumerate(found):
        message = {"message": {"role": "assistant", "content": piece.text}}
        said = message if asked.is_chat else {"text": piece.text}
        choices.append(asked.choice(number, piece.reason) | said)
    return {**asked.head, "choices": choices, "usage": asked.usage(), **asked.extra}


async def events(asked: Replies) -> AsyncGenerator[bytes, None]:
    """The answer to a request that streams, as server-sent events."""
    head = {**asked.head, "object": asked.head["object"] + ".chunk" * asked.is_chat}
    more = {"usage": None} if asked.include_usage else {}

    def chunk(number: int, piece: Piece, role: bool = False) -> dict:
        delta = {"content": piece.text} | ({"role": "assistant"} if role else {})
        choice = {"delta": delta} if asked.is_chat else {"text": piece.text}
        return {**head, "choices": [asked.choice(number, piece.reason) | choice], **more}

    for number in range(len(asked.jobs) if asked.is_chat else 0):
        extra = {} if number else asked.extra
        yield event(chunk(number, Piece(""), role=True) | extra)
    try:
        async with aclosing(asked.pieces()) as pieces:
            async for item in pieces:
                yield event(chunk(*item))
    except Refused as refused:
        yield event(refused.body)
        return
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": asked.usage()})
    yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    return b"data: " + JSONResponse(data).body + b"\n\n"


async def unless_gone(work: Coroutine, receive: Receive) -> Any:
    """What the work gives; it is cancelled, and who waits for it, if the client leaves before."""
    doing = asyncio.create_task(work)

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        doing.cancel()

    leaving = asyncio.create_task(leave())
    try:
        return await doing
    finally:
        leaving.cancel()


class EventStream(StreamingResponse):
    """A response that stops writing replies as soon as the client leaves, and frees its places.

    places: closed at the end, however it comes
    """

    def __init__(self, asked: Replies, places: ExitStack) -> None:
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


def titles(body: ChatRequest, model: Model, text: str, metrics: Metrics) -> Replies:
    """Titles of a text, the best first, which are found before this returns.

    raises: Refused (400) if the model's context is too short for any text
    """
    tokenizer = model.engine.tokenizer
    try:
        found = suggest(model.engine.decoder, tokenizer, text, body.n or 1)
    except ConfigError as error:
        raise Refused(400, str(error), "messages", "context_length_exceeded") from None
    prompt = tokenizer.encode(text[: found.n_read])
    replies = [Reply(tokenizer.encode(title), title, "eos") for title in found.titles or [""]]
    jobs = [Job(prompt, SamplingConfig(), lambda piece: None, reply=reply) for reply in replies]

    def submit(mailbox: Mailbox) -> None:
        for number, reply in enumerate(replies):
            mailbox.put_nowait((number, Piece(reply.text, reply.reason)))

    extra = {"read": {"characters": found.n_read, "of": len(text)}}
    return Replies(body, model, jobs, extra, metrics, submit)
