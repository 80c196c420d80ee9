"""S1: requests that chance has spoilt, to the whole application in one process, a real model in it.

The fuzzer that reads the server's description is in test_serve_load.py; this one knows what is sent
and damages it: values of other kinds, numbers out of range, fields that are missing or too many,
bytes that are no text.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy

import httpx
import pytest

from babyllama.cpu.decoder import make_decoder
from serve.app import make_app
from serve.engine import Engine
from serve.models import Model, ServerConfig
from serve.page_routes import Service
from serve.scheduler import Desk, Metrics
from serving import endless_model

CONTEXT = 48
HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), "", " ", "\0", "\ud800", "NaN", "1", "好" * 5000,
    "\u202e\u2066", "👩‍👩‍👧", [], {}, [[]], [None], [{}], {"": ""}, ["a"] * 600, "system",
]  # fmt: skip
FIELDS = {
    "model": "small", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 5,
    "stop": ["。"], "stream": True, "stream_options": {"include_usage": True}, "user": "u",
    "frequency_penalty": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "no_repeat_ngram": 3, "loop_guard": "end",
}  # fmt: skip
OF_CHAT = {"logprobs": False, "reference": "花", "retrieve": False, "truncate": True,
           "max_completion_tokens": 2}  # fmt: skip
TALK = [{"role": "system", "content": "资料"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"}, {"role": "user", "content": "再见"}]  # fmt: skip


def places_in(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside of a body."""
    if path:
        yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places_in(inner, (*path, key))


def spoilt(chance: random.Random) -> tuple[str, bytes]:
    """A path and a body: one in six as it should be, the others with one to three faults."""
    is_chat = chance.random() < 0.75
    body: dict = {"messages": TALK[chance.randrange(4) :]} if is_chat else {"prompt": ["今天", "x"]}
    known = FIELDS | (OF_CHAT if is_chat else {})
    body |= {name: known[name] for name in chance.sample(sorted(known), chance.randrange(6))}
    body = json.loads(json.dumps(body))
    n_faults = chance.choice([0, 1, 1, 1, 2, 3])
    for _ in range(n_faults):
        *way, last = chance.choice([*places_in(body), ("messages" if is_chat else "prompt",)])
        inner = body
        for key in way:
            inner = inner[key]
        fault = chance.randrange(4)
        if fault == 0:
            inner.pop(last, None) if isinstance(inner, dict) else inner.pop(last)
        elif fault == 1 and isinstance(inner, dict):
            name = chance.choice(["tools", "\ud800", "", *FIELDS, *OF_CHAT])
            inner[name] = deepcopy(chance.choice(HOSTILE))
        else:
            inner[last] = deepcopy(chance.choice(HOSTILE))
    sent = bytearray(json.dumps(body).encode())
    if chance.random() < 0.1:
        for _ in range(chance.randint(1, 4)):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        sent = sent[: chance.randint(0, len(sent))]
    return "/v1/chat/completions" if is_chat else "/v1/completions", bytes(sent)


def check(answer: httpx.Response, sent: bytes) -> None:
    """An answer is whole and of a kind that a client of OpenAI's understands."""
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, sent)
    if answer.headers["content-type"].startswith("text/event-stream"):
        *events, end = answer.text.strip().split("\n\n")
        assert end == "data: [DONE]", (end, sent)
        assert all(json.loads(event[6:])["id"] for event in events if event.startswith("data: "))
    elif answer.status_code == 200:
        assert all(choice["finish_reason"] in ("stop", "length")
                   for choice in answer.json()["choices"])  # fmt: skip
    else:
        error = answer.json()["error"]
        assert error["message"] and "\n" not in error["message"], (error, sent)
        assert error["type"] == "invalid_request_error" and "param" in error


async def fuzz(app: object, desk: Desk, n: int) -> Counter[int]:
    desk.start(asyncio.get_running_loop())
    chance, statuses = random.Random(0), Counter()
    requests = (spoilt(chance) for _ in range(n))
    headers = {"content-type": "application/json"}
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))  # a fault of ours is raised

    async def client() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            for path, sent in requests:
                async with asyncio.timeout(60):
                    answer = await http.post(path, content=sent, headers=headers)
                check(answer, sent)
                statuses[answer.status_code] += 1

    await asyncio.gather(*(client() for _ in range(8)))
    desk.stop()
    return statuses


@pytest.mark.parametrize(
    "n", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_spoilt_requests_are_answered_or_refused_with_the_field(tokenizer, tmp_path, n):
    engine = Engine(make_decoder(endless_model(tokenizer, CONTEXT)), tokenizer, 8)
    desk = Desk([engine], 1000, 1000, Metrics())
    models = {"small": Model("small", engine, tmp_path, tmp_path)}
    app = make_app(Service(desk, models, ServerConfig(wiki_url=""), None))
    statuses = asyncio.run(fuzz(app, desk, n))
    print(dict(statuses))
    assert statuses.total() == n and min(statuses[200], statuses[400]) > n // 5
    assert desk.metrics.registry.get_sample_value("babyllama_open_replies") == 0
