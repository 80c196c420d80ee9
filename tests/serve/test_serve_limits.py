"""How much a server takes on at a time, and how it ends when it must not wait."""

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving import Running, endless_model, save, serving

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    return save(endless_model(tokenizer), tokenizer, tmp_path_factory.mktemp("limits") / "small")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Running]:
    """Twelve places, ten of them for one client; old turns are left out."""
    log = tmp_path_factory.mktemp("log") / "log"
    flags = ("--slots", "4", "--queue", "8", "--per-client", "10", "--truncate", "true")
    with serving(checkpoint, log, *flags) as server:
        yield server


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address for themselves")
def test_all_clients_together_are_refused_what_is_too_much(server):
    """S6: two clients, of which each may have ten replies, and both together twelve."""

    async def burst(address: str) -> list[httpx.Response]:
        transport = httpx.AsyncHTTPTransport(
            local_address=address, limits=httpx.Limits(max_connections=50)
        )
        body = {"messages": ASK, "max_tokens": 300}
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(server.url + CHAT, json=body) for _ in range(20))
            )

    async def both() -> list[list[httpx.Response]]:
        return await asyncio.gather(burst("127.0.0.1"), burst("127.0.0.2"))

    answers = [answer for found in asyncio.run(both()) for answer in found]
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429} and counts[200] >= 12
    refused = [answer for answer in answers if answer.status_code == 429]
    assert any("at most 12 may be" in answer.json()["error"]["message"] for answer in refused)
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert server.metric('babyllama_refused_total{reason="queue"}') > 0
    assert server.metric("babyllama_open_replies") == 0


def test_a_server_may_leave_out_old_turns_unless_a_request_says_otherwise(server):
    """S2."""
    turns = [
        {"role": role, "content": "今天天气很好。" * 60} for role in ("user", "assistant") * 20
    ]
    body = {"messages": [*turns, *ASK], "max_tokens": 5}
    found = httpx.post(server.url + CHAT, json=body)
    assert found.status_code == 200 and found.json()["dropped_messages"] > 0
    found = httpx.post(server.url + CHAT, json=body | {"truncate": False})
    assert found.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("seconds, n_signals", [(60, 2), (0, 1)])
def test_a_second_ctrl_c_or_the_end_of_its_time_ends_a_server_at_once(
    checkpoint, tmp_path, seconds, n_signals
):
    with serving(checkpoint, tmp_path / "log", "--shutdown-seconds", str(seconds)) as server:
        sent = {"messages": ASK, "max_tokens": 4000, "stream": True, "n": 8}
        with httpx.stream("POST", server.url + CHAT, json=sent, timeout=60) as found:
            lines = found.iter_lines()
            for _ in range(30):
                next(lines)
            for _ in range(n_signals):
                server.process.send_signal(signal.SIGINT)
                with pytest.raises(httpx.TransportError):  # so that it has noticed
                    while True:
                        httpx.get(server.url + "/health")
            with pytest.raises(httpx.RemoteProtocolError):
                ended = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                assert not ended  # what came whole was not cut off
        assert server.process.wait(timeout=20) == 0
