"""Titles by the API: `task: "title"`, with the search of the terminal and of scoring.

One text comes in, its best titles go out as the choices of a chat completion. The search runs in a
thread of its own, one at a time; its decoder is the engine's, which any number of threads may use.
"""

import asyncio
from collections.abc import Iterator

from starlette.responses import JSONResponse, Response

from babyllama.errors import ConfigError
from babyllama.sampling import SamplingConfig
from babyllama.scoring.summarise import suggest
from serve.answers import event, new_head
from serve.engine import Engine
from serve.errors import Refused
from serve.schema import ChatRequest

MOST_TITLES = 4

# What the search sets itself, and what has no place beside it.
_TAKEN = {
    *SamplingConfig.__dataclass_fields__, "max_tokens", "max_completion_tokens", "logprobs",
    "top_logprobs", "reference", "retrieve", "truncate",
} - {"n"}  # fmt: skip


def text_of(request: ChatRequest) -> str:
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


async def answer(request: ChatRequest, text: str, engine: Engine, model: str) -> Response:
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
        events = _events(head | {"object": "chat.completion.chunk"} | more, titles, end,
                         usage if with_usage else None)  # fmt: skip
        return Response(b"".join(events), media_type="text/event-stream")
    choices = [
        {"index": number, **end, "message": {"role": "assistant", "content": title}}
        for number, title in enumerate(titles)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage, **more})


def _events(head: dict, titles: list[str], end: dict, usage: dict | None) -> Iterator[bytes]:
    for number, title in enumerate(titles):
        said = {"index": number, "finish_reason": None, "logprobs": None}
        delta = {"role": "assistant", "content": title}
        yield event({**head, "choices": [said | {"delta": delta}]})
        yield event({**head, "choices": [{"index": number, **end, "delta": {}}]})
    if usage:
        yield event({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"
