"""Many clients at once, and a fuzzer that reads the server's own description."""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import TEXTS
from serving import Running, endless_model, save, serving

CHAT = "/v1/chat/completions"

# Pieces that a busy client finds lying there together have arrived together.
SAME_ARRIVAL_S = 0.0005


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("load")
    checkpoint = save(endless_model(tokenizer, context=256), tokenizer, place / "small")
    with serving(checkpoint, place / "log", "--per-client", "1000") as server:
        yield server


@pytest.fixture(scope="module")
def brief(tokenizer, tmp_path_factory) -> Iterator[Running]:
    """A server whose replies are short, for many requests."""
    place = tmp_path_factory.mktemp("brief")
    checkpoint = save(endless_model(tokenizer, context=48), tokenizer, place / "small")
    with serving(checkpoint, place / "log") as server:
        yield server


def request(number: int) -> dict:
    """One of 24 requests, each of which has one reply only."""
    text = TEXTS[number % len(TEXTS)][: 5 + number % 24]
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "seed": number % 24, "max_tokens": 10 + 5 * (number % 24),
            "temperature": 1.0, "stream": number % 3 > 0}  # fmt: skip


class Seen:
    """What the clients of a load test saw; gaps: seconds between two arrivals of a stream."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.gaps: list[float] = []
        self.wrong: list[str] = []
        self.n_tokens = 0


def reply_of(answer: str, is_stream: bool) -> str:
    """The text of a whole answer."""
    if not is_stream:
        return json.loads(answer)["choices"][0]["message"]["content"]
    events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content", "") for delta in deltas)


async def one_client(
    http: httpx.AsyncClient, number: int, until: float, wanted: list[str], seen: Seen
) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        number = chance.randrange(24)
        body = request(number)
        async with http.stream("POST", CHAT, json=body) as found:
            seen.statuses[found.status_code] += 1
            data, last = b"", None
            async for part in found.aiter_bytes():
                now = time.monotonic()
                if last is not None and body["stream"] and now - last > SAME_ARRIVAL_S:
                    seen.gaps.append(now - last)
                data, last = data + part, now
        if found.status_code == 429:
            await asyncio.sleep(min(float(found.headers["retry-after"]), 1) * chance.random())
            continue
        text = reply_of(data.decode("utf-8"), body["stream"])
        seen.n_tokens += body["max_tokens"]
        if text != wanted[number]:
            seen.wrong.append(f"{number}: {text!r}")


async def load(url: str, n_clients: int, seconds: float) -> tuple[Seen, float]:
    """Clients that ask again and again; also tokens/s of one that asks alone."""
    limits = httpx.Limits(max_connections=n_clients + 1)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
        started, wanted, n_tokens = time.monotonic(), [], 0
        for number in range(24):
            found = (await http.post(CHAT, json=request(number) | {"stream": False})).json()
            wanted.append(found["choices"][0]["message"]["content"])
            n_tokens += found["usage"]["completion_tokens"]
        alone = n_tokens / (time.monotonic() - started)
        seen, until = Seen(), time.monotonic() + seconds
        clients = (one_client(http, n, until, wanted, seen) for n in range(n_clients))
        await asyncio.gather(*clients)
        return seen, alone


@pytest.mark.parametrize(
    "n_clients, seconds",
    [(20, 3), pytest.param(200, 120, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_under_load_every_request_gets_its_own_whole_reply_or_429(server, n_clients, seconds):
    started = time.monotonic()
    seen, alone = asyncio.run(load(server.url, n_clients, seconds))
    gaps = statistics.quantiles(seen.gaps, n=100)
    figures = {
        "clients": n_clients, "seconds": round(time.monotonic() - started, 1),
        "statuses": dict(seen.statuses), "wrong": len(seen.wrong),
        "between_ms": {"median": round(1e3 * gaps[49], 1), "p95": round(1e3 * gaps[94], 1),
                       "p99": round(1e3 * gaps[98], 1)},
        "tokens_per_s": round(seen.n_tokens / seconds), "alone_tokens_per_s": round(alone),
        "memory_mb": round(server.metric("process_resident_memory_bytes") / 1e6),
    }  # fmt: skip
    print(json.dumps(figures))
    assert not seen.wrong, seen.wrong[:3]
    assert set(seen.statuses) <= {200, 429} and seen.statuses[200] >= n_clients
    assert server.metric("babyllama_open_replies") == 0


@pytest.mark.parametrize(
    "least, phases, examples",
    [
        (75, "fuzzing", 30),
        pytest.param(5000, "coverage,fuzzing,stateful", 1300,
                     marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)  # fmt: skip
def test_no_request_that_the_description_allows_or_forbids_is_a_fault(
    brief, tmp_path: Path, least, phases, examples
):
    """S1, by schemathesis: no 5xx, no answer that the description does not know."""
    before = brief.metric("process_resident_memory_bytes")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"  # noqa: E501
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{brief.url}/openapi.json",
        "--checks", checks, "--phases", phases, "--max-examples", str(examples), "--seed", "1",
        "--no-color", "--request-timeout", "30", "--generation-database", "none",
        "--warnings", "off", "--max-failures", "5",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    n_cases = int(re.search(r"([\d,]+) generated", done.stdout)[1].replace(",", ""))
    print(f"{n_cases} cases")
    assert n_cases >= least, done.stdout[-2000:]
    assert httpx.post(brief.url + CHAT, json=request(1) | {"stream": False}).status_code == 200
    assert brief.metric("babyllama_open_replies") == 0
    assert brief.metric("process_resident_memory_bytes") < before + 100e6
