"""Replies in OpenAI's form: whole, or as a stream of server-sent events; and titles in that form.

Titles (`task: "title"`) come from the search of the terminal and of scoring, which runs in a thread
of its own, one at a time; its decoder is the engine's, which any number of threads may use.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from babyllama.errors import ConfigError
from babyllama.sampling import SamplingConfig
from babyllama.scoring.summarise import suggest
from serve.engine import Engine, Job, Piece, TokenScore
from serve.scheduler import Desk, Mailbox, Metrics
from serve.schema import ChatRequest, Refused, refusal
from tokenizer import Tokenizer

# What OpenAI's clients know of the ways a reply ends; the exact one is in `end`.
FINISH = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length", "time": "length"}
KEEP_ALIVE_S = 10


def new_head(model: str, is_chat: bool) -> dict:
    """What every answer begins with."""
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
    }


@dataclass
class Asked:
    """One request under way: its jobs, and how its replies are to be written down.

    is_chat: chat.completion, else text_completion
    """

    desk: Desk
    engine: Engine
    jobs: list[Job]
    model: str
    is_chat: bool
    metrics: Metrics
    extra: dict
    include_usage: bool = False
    mailbox: Mailbox = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.head = new_head(self.model, self.is_chat)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """Pieces of all replies as they come; None when nothing came for a while. Who stops
        listening cancels what is left."""
        left, last = len(self.jobs), time.perf_counter()
        seen: dict[int, float] = {}
        self.desk.submit(self.engine, self.jobs, self.mailbox)
        try:
            while left:
                try:
                    # Not wait_for: before Python 3.12 it may swallow a cancellation.
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        number, piece = await self.mailbox.get()
                except TimeoutError:
                    yield None
                    continue
                now = time.perf_counter()
                found = self.metrics.between if number in seen else self.metrics.first
                found.observe(now - seen.get(number, last))
                seen[number] = now
                if piece.reason:
                    left -= 1
                    self.metrics.replies.labels(piece.reason).inc()
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
            "prompt_tokens": n_prompt,
            "completion_tokens": n_reply,
            "total_tokens": n_prompt + n_reply,
            "prompt_tokens_details": {"cached_tokens": sum(job.n_known for job in prompts)},
        }

    def scores(self, scores: list[TokenScore], offset: int) -> dict:
        """Log-probabilities of tokens; offset: characters before them."""
        tokenizer = self.engine.tokenizer
        if self.is_chat:
            return {"content": [
                {**_named(tokenizer, s.token, s.logprob),
                 "top_logprobs": [_named(tokenizer, *top) for top in s.top]} for s in scores
            ]}  # fmt: skip

        def text(token: int) -> str:
            return tokenizer.piece_bytes[token].decode("utf-8", "replace")

        texts = [text(s.token) for s in scores]
        places = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": [{text(t): p for t, p in s.top} for s in scores],
            "text_offset": places,
        }


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict:
    data = tokenizer.piece_bytes[token]
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob, "bytes": list(data)}


def failure(reason: str, has_text: bool) -> Refused | None:
    """What a reply that ended badly is to the client; None if it is a reply."""
    if reason == "error":
        text = "the model gave numbers that are not finite, or stopped; see the server's log"
        return Refused(500, text, code="model_error")
    if reason == "time" and not has_text:
        text = "the server was too busy to begin a reply in time; try again in 5 s"
        return Refused(503, text, code="overloaded", headers={"Retry-After": "5"})
    return None


async def whole(asked: Asked) -> dict:
    """The answer to a request that does not stream.

    raises: Refused if a reply could not be written
    """
    texts = [""] * len(asked.jobs)
    reasons = [""] * len(asked.jobs)
    scores: list[list[TokenScore]] = [[] for _ in asked.jobs]
    async with aclosing(asked.pieces()) as pieces:
        async for item in pieces:
            if item is None:
                continue
            number, piece = item
            texts[number] += piece.text
            scores[number] += piece.scores
            reasons[number] = piece.reason
            refused = failure(piece.reason, bool(asked.jobs[number].reply.ids))
            if refused:
                raise refused
    choices = []
    for number, job in enumerate(asked.jobs):
        choice = {"index": number, "finish_reason": FINISH[reasons[number]], "end": reasons[number]}
        choice["logprobs"] = None if job.n_top is None else asked.scores(scores[number], 0)
        said = {"role": "assistant", "content": texts[number]}
        choice |= {"message": said} if asked.is_chat else {"text": texts[number]}
        choices.append(choice)
    return {**asked.head, "choices": choices, "usage": asked.usage(), **asked.extra}


async def events(asked: Asked) -> AsyncGenerator[bytes, None]:
    """The answer to a request that streams, as server-sent events."""
    head = {**asked.head, "object": asked.head["object"] + ".chunk" * asked.is_chat}
    more = {"usage": None} if asked.include_usage else {}
    n_characters = [0] * len(asked.jobs)

    def chunk(number: int, piece: Piece, role: bool = False) -> bytes:
        delta = {"role": "assistant"} if role else {}
        if piece.text or role:
            delta["content"] = piece.text
        choice: dict[str, Any] = {"index": number, "finish_reason": FINISH.get(piece.reason)}
        choice["logprobs"] = None
        if piece.reason:
            choice["end"] = piece.reason
        if piece.scores:
            choice["logprobs"] = asked.scores(piece.scores, n_characters[number])
        n_characters[number] += len(piece.text)
        choice |= {"delta": delta} if asked.is_chat else {"text": piece.text}
        return event({**head, "choices": [choice], **more})

    if asked.is_chat:
        for number in range(len(asked.jobs)):
            first = chunk(number, Piece("", []), role=True)
            if number == 0 and asked.extra:
                yield event({**json.loads(first[6:]), **asked.extra})
            else:
                yield first
    async with aclosing(asked.pieces()) as pieces:
        async for item in pieces:
            if item is None:
                yield b": waiting\n\n"
                continue
            number, piece = item
            refused = failure(piece.reason, bool(asked.jobs[number].reply.ids))
            if refused:
                yield event(refused.body)
                return
            yield chunk(number, piece)
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": asked.usage()})
    yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8") + b"\n\n"


async def unless_gone(work: Coroutine, receive: Receive) -> asyncio.Task | None:
    """The work, done; None where the client left before, which ends it."""
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        # The pieces' own clean-up must have run when the places are given back.
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that stops writing replies as soon as the client leaves, and frees its places.

    places: closed at the end, however it comes
    """

    def __init__(self, asked: Asked, places: ExitStack) -> None:
        super().__init__(media_type="text/event-stream")
        self.asked, self.places = asked, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.places:
            sent = await unless_gone(self._send(send), receive)
        if sent:
            sent.result()

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        found = events(self.asked)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in found:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except Refused as refused:  # before the first piece
            body = event(refusal(refused.status, str(refused)))
            await send({"type": "http.response.body", "body": body})
        finally:
            await found.aclose()


MOST_TITLES = 4

# What the search sets itself, and what has no place beside it.
_TAKEN = {
    *SamplingConfig.__dataclass_fields__, "max_tokens", "max_completion_tokens", "logprobs",
    "top_logprobs", "reference", "retrieve", "truncate",
} - {"n"}  # fmt: skip


def titled_text(request: ChatRequest) -> str:
    """The text that wants a title.

    raises: Refused (400) if the request says more, or something that the search would not heed
    """
    for name in sorted(_TAKEN & request.model_fields_set):
        if getattr(request, name) is not None:
            text = f"{name}: titles are found by a search with settings of its own; leave it out"
            raise Refused(400, text, name, "invalid_value")
    if len(request.messages) > 1 or request.messages[0].role != "user":
        text = f"task title wants one message, the user's text, found {len(request.messages)}"
        raise Refused(400, text, "messages", "invalid_value")
    if not request.messages[0].text.strip() or request.messages[0].images:
        raise Refused(400, "messages.0.content: wanted a text", "messages.0", "invalid_value")
    if (request.n or 1) > MOST_TITLES:
        text = f"n: wanted at most {MOST_TITLES} titles, found {request.n}"
        raise Refused(400, text, "n", "invalid_value")
    return request.messages[0].text.strip()


async def answer_titles(request: ChatRequest, text: str, engine: Engine, model: str) -> Response:
    """The titles, the best first, whole or as events.

    raises: Refused (400) if the model's context is too short for any text
    """
    tokenizer = engine.tokenizer
    try:
        found = await asyncio.to_thread(suggest, engine.decoder, tokenizer, text, request.n or 1)
    except ConfigError as error:
        raise Refused(400, str(error), "messages", "context_length_exceeded") from None
    titles = found.titles or [""]
    n_prompt = len(tokenizer.encode(text[: found.n_read]))
    n_reply = sum(len(tokenizer.encode(title)) for title in titles)
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_reply,
             "total_tokens": n_prompt + n_reply}  # fmt: skip
    head = new_head(model, is_chat=True)
    more = {"read": {"characters": found.n_read, "of": len(text)}}
    end = {"finish_reason": "stop", "end": "eos", "logprobs": None}
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        events = _title_events(head | {"object": "chat.completion.chunk"} | more, titles, end,
                         usage if with_usage else None)  # fmt: skip
        return Response(b"".join(events), media_type="text/event-stream")
    choices = [
        {"index": number, **end, "message": {"role": "assistant", "content": title}}
        for number, title in enumerate(titles)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage, **more})


def _title_events(head: dict, titles: list[str], end: dict, usage: dict | None) -> Iterator[bytes]:
    for number, title in enumerate(titles):
        said = {"index": number, "finish_reason": None, "logprobs": None}
        delta = {"role": "assistant", "content": title}
        yield event({**head, "choices": [said | {"delta": delta}]})
        yield event({**head, "choices": [{"index": number, **end, "delta": {}}]})
    if usage:
        yield event({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"
