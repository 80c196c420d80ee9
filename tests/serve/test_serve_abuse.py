"""What clients do wrong, or do on purpose: the server says no, lives, and forgets."""

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from babyllama.decoder import Decoder
from babyllama.language.letters import plain
from babyllama.sampling import SamplingConfig
from conftest import TEXTS
from serve.engine import Engine, Job
from serve.scheduler import Desk, Metrics
from serve.schema import Refused
from serving import CONTEXT, Running, endless_model, save, serving

CHAT = "/v1/chat/completions"
KEY = "a-key-of-some-length"
ASK = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("abuse") / "small"
    return save(endless_model(tokenizer), tokenizer, place)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[Running]:
    """A short time for requests, few places."""
    log = tmp_path_factory.mktemp("log") / "log"
    flags = ("--body-seconds", "1.5", "--slots", "4", "--queue", "8", "--per-client", "10")
    with serving(checkpoint, log, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(checkpoint, tmp_path_factory) -> Iterator[Running]:
    """A server with a key, whose replies end after a second."""
    place = tmp_path_factory.mktemp("guarded")
    (place / "key").write_text(KEY + "\n", "utf-8-sig")  # as Notepad and PowerShell write
    flags = ("--api-key-file", str(place / "key"), "--reply-seconds", "1", "--host", "0.0.0.0")
    with serving(checkpoint, place / "log", *flags) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        yield server


def body(**changes: object) -> dict:
    return {"messages": ASK, "max_tokens": 4} | changes


def deep(n: int) -> list:
    found: list = []
    for _ in range(n):
        found = [found]
    return found


BAD = {
    "no_messages": ({"max_tokens": 4}, "messages"),
    "empty_messages": (body(messages=[]), "messages"),
    "messages_is_text": (body(messages="你好"), "messages"),
    "unknown_role": (body(messages=[{"role": "robot", "content": "好"}]), "messages.0.role"),
    "no_content": (body(messages=[{"role": "user"}]), "messages.0.content"),
    "null_content": (body(messages=[{"role": "user", "content": None}]), "messages.0.content"),
    "blank": (body(messages=[{"role": "user", "content": " \n\u3000"}]), "messages.0"),
    "last_is_ours": (body(messages=[*ASK, {"role": "assistant", "content": ""}]), "messages.1"),
    "late_system": (body(messages=[*ASK, {"role": "system", "content": "x"}, *ASK]), "messages.1"),
    "negative_temperature": (body(temperature=-1), "temperature"),
    "huge_temperature": (body(temperature=1e300), "temperature"),
    "temperature_is_text": (body(temperature="1"), "temperature"),
    "temperature_is_true": (body(temperature=True), "temperature"),
    "zero_top_p": (body(top_p=0), "top_p"),
    "zero_tokens": (body(max_tokens=0), "max_tokens"),
    "negative_tokens": (body(max_tokens=-5), "max_tokens"),
    "half_a_token": (body(max_tokens=1.5), "max_tokens"),
    "endless_tokens": (body(max_tokens=10**30), "max_tokens"),
    "many_replies": (body(n=1000), "n"),
    "no_reply": (body(n=0), "n"),
    "large_seed": (body(seed=2**80), "seed"),
    "empty_stop": (body(stop=""), "stop"),
    "ten_thousand_stops": (body(stop=[str(n) for n in range(10_000)]), "stop"),
    "long_stop": (body(stop="长" * 5000), "stop"),
    "unknown_field": (body(colour="red"), "colour"),
    "tools": (body(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    "presence_penalty": (body(presence_penalty=0.5), "presence_penalty"),
    "penalty_is_false": (body(presence_penalty=False), "presence_penalty"),
    "json_wanted": (body(response_format={"type": "json_object"}), "response_format"),
    "stored": (body(store=True), "store"),
    "token_ids_as_stop": (body(stop=[5, 6]), "stop"),
    "tool_role": (body(messages=[*ASK, {"role": "tool", "content": "x"}]), "messages.1.role"),
    "tool_calls": (
        body(messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *ASK]),
        "messages.0.tool_calls",
    ),
    "field_of_a_part": (
        body(messages=[{"role": "user", "content": [
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}]),
        "messages.0.content.0.cache_control",
    ),
    "no_text_in_a_part": (
        body(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "messages.0.content.0.text",
    ),
    "unknown_part": (
        body(messages=[{"role": "user", "content": [{"type": "file", "file": {}}]}]),
        "messages.0.content.0",
    ),
    "picture": (
        body(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]),
        "messages.0",
    ),
    "logprobs": (body(logprobs=True), "logprobs"),
    "deep": (body(messages=deep(90)), "messages"),
    "501_messages": (body(messages=ASK * 501), "messages"),
    "32001_characters": (body(messages=[{"role": "user", "content": "好" * 32_001}]), "messages"),
    "unknown_model": (body(model="gpt-4"), "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused_with_the_field(server, name):
    """S1, S3."""
    sent, param = BAD[name]
    found = httpx.post(server.url + CHAT, json=sent)
    assert found.status_code == (404 if name == "unknown_model" else 400), found.text
    error = found.json()["error"]
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"
    assert error["message"].count("\n") == 0
    said = json.dumps(error)
    assert not re.search(r"function|0x|pydantic|validator|dictionary|Extra|Value error", said), said


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe\xfa", b'{"messages": "\xc3\x28"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(server, sent):
    found = httpx.post(
        server.url + CHAT, content=sent, headers={"content-type": "application/json"}
    )
    assert found.status_code == 400 and found.json()["error"]["message"], found.text


def test_other_kinds_of_body_and_path_are_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": kind}
        found = httpx.post(server.url + CHAT, content=json.dumps(body()), headers=headers)
        assert found.status_code == 400
    for path in ("/v1/nothing", "/../etc/passwd", "/page/../server.py", "/%2e%2e/serve/server.py"):
        assert httpx.get(server.url + path).status_code == 404
    assert httpx.get(server.url + CHAT).status_code == 405
    assert httpx.delete(server.url + "/v1/models").json()["error"]["message"]


STRANGE = {
    "one_word": "Llanfair" * 2000,
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "right_to_left": "\u202egpj.exe\u202c \u2066x\u2069",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 20,
    "nul": "a\x00b",
    "rare": "𠮷𪚥\U0010ffff\ufffe",
    "html": "<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_text_is_answered_or_refused_for_its_length(server, tokenizer, name):
    messages = [{"role": "user", "content": STRANGE[name]}]
    found = httpx.post(server.url + CHAT, json=body(messages=messages), timeout=30)
    plain_messages = [{"role": "user", "content": plain(STRANGE[name])}]
    n_tokens = len(tokenizer.render_prompt(plain_messages))
    if n_tokens >= CONTEXT:
        assert found.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert found.status_code == 200
        assert found.json()["usage"]["prompt_tokens"] == n_tokens


def test_large_bodies_are_refused_unread(server):
    """S3: 100 MB announced, and 100 MB without a word about it."""
    before = server.metric("process_resident_memory_bytes")
    found = httpx.post(server.url + CHAT, content=b"x" * (1024 * 1024 + 1))
    assert found.status_code == 413
    for announced in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = b"Content-Length: 100000000" if announced else b"Transfer-Encoding: chunked"
            sock.sendall(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % (CHAT.encode(), head)
            )
            sock.settimeout(30)
            part = b"x" * 65_536
            part = part if announced else b"10000\r\n" + part + b"\r\n"
            try:
                for _ in range(100_000_000 // 65_536):
                    sock.sendall(part)
            except OSError:
                pass  # it may hang up on who does not stop
            assert sock.recv(20).startswith(b"HTTP/1.1 413")
    assert server.metric("process_resident_memory_bytes") < before + 50e6


def test_slow_clients_are_let_go_and_hinder_nobody(server):
    """S7: heads that do not end, bodies that do not come, on new and on used connections."""
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % CHAT.encode()
    body_head = head + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    used = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea"
    sent = [b"", head, body_head, used] * 5
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in sent]
    started = time.monotonic()
    for sock, data in zip(slow, sent, strict=True):
        sock.sendall(data)
    assert httpx.post(server.url + CHAT, json=body()).status_code == 200
    for sock, data in zip(slow, sent, strict=True):
        sock.settimeout(20)
        found = b""
        while part := sock.recv(4096):
            found += part
        if data == body_head:
            assert found.startswith(b"HTTP/1.1 408")
        elif data == used:
            assert found.startswith(b"HTTP/1.1 200")
        else:
            assert found == b""
        sock.close()
    assert time.monotonic() - started < 15


def test_a_used_connection_may_rest_longer_than_a_head_may_take(server):
    """A pool's next request is not met by a connection that is just being closed."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sock.settimeout(20)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
            sock.settimeout(2.5)
            with pytest.raises(TimeoutError):  # neither more to read nor closed
                while sock.recv(4096):
                    pass


def test_replies_end_when_their_clients_leave(server):
    """S5."""
    for _ in range(50):
        with httpx.stream(
            "POST", server.url + CHAT, json=body(max_tokens=4000, stream=True)
        ) as found:
            assert found.status_code == 200
            next(found.iter_raw())
    started = time.monotonic()
    wait_until(lambda: server.metric("babyllama_open_replies") == 0)
    assert httpx.post(server.url + CHAT, json=body()).status_code == 200
    assert time.monotonic() - started < 5
    with pytest.raises(httpx.ReadTimeout):  # one that does not stream
        httpx.post(server.url + CHAT, json=body(max_tokens=4000), timeout=0.3)
    wait_until(lambda: server.metric("babyllama_open_replies") == 0)
    assert server.metric('babyllama_replies_total{end="length"}') < 40


def wait_until(done, seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_burst_is_answered_or_refused_while_health_is_well(server):
    """S6: 100 at once, of which one client may have 10, whatever it calls itself."""

    def named(n: int) -> dict[str, str]:
        return {"x-forwarded-for": f"10.0.0.{n}"}

    async def burst() -> tuple[list[httpx.Response], list[float]]:
        limits = httpx.Limits(max_connections=200, keepalive_expiry=1)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            asked = [
                asyncio.create_task(client.post(CHAT, json=body(max_tokens=200), headers=named(n)))
                for n in range(100)
            ]
            waits = []
            while not all(task.done() for task in asked):
                started = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                waits.append(time.monotonic() - started)
            return [await task for task in asked], waits

    found, waits = asyncio.run(burst())
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 10
    for response in found:
        if response.status_code == 429:
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["error"]["type"] == "rate_limit_error"
        else:
            assert response.json()["usage"]["completion_tokens"] == 200
    assert max(waits) < 10
    assert server.metric('babyllama_refused_total{reason="client"}') > 0
    assert server.metric('babyllama_refused_total{reason="queue"}') == 0
    assert server.metric("babyllama_open_replies") == 0


def test_other_sites_and_names_are_refused(server):
    """CORS stays off, and a name that was turned to this address opens nothing."""
    for headers, status in (
        ({"origin": "https://example.org"}, 403), ({"origin": "null"}, 403),
        ({"host": "example.org"}, 403), ({"origin": server.url}, 200),
        ({"host": f"localhost:{server.port}"}, 200), ({"host": f"[::1]:{server.port}"}, 200),
    ):  # fmt: skip
        found = httpx.post(server.url + CHAT, json=body(), headers=headers)
        assert found.status_code == status, headers
        assert not [name for name in found.headers if name.startswith("access-control")]
    assert httpx.options(server.url + CHAT, headers={"origin": server.url}).status_code == 405


def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere(server):
    for path in ("/", "/page.js", "/v1/models", "/nothing"):
        headers = httpx.get(server.url + path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "method, path, is_open",
    [
        ("GET", "/", True), ("GET", "/page.js", True), ("GET", "/health", True),
        ("GET", "/v1/models", False), ("POST", CHAT, False), ("POST", "/v1/completions", False),
        ("GET", "/metrics", False), ("GET", "/api/settings", False),
        ("GET", "/openapi.json", False),
        ("GET", "/api/wiki?term=x", False), ("GET", "/nothing", False),
    ],
)  # fmt: skip
def test_the_key_opens_every_route_and_nothing_else_does(guarded, method, path, is_open):
    """S8."""

    def status(key: str | None) -> int:
        headers = {} if key is None else {"authorization": key.encode("latin-1")}
        return httpx.request(method, guarded.url + path, headers=headers).status_code

    for wrong in (None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}",
                  "Bearer \xe9\xff"):  # fmt: skip
        assert (status(wrong) != 401) == is_open, wrong
    assert status(f"Bearer {KEY}") != 401


def test_replies_end_when_their_time_is_up(guarded):
    """S4: none of them would end by itself so soon."""
    found = httpx.post(
        guarded.url + CHAT, json=body(max_tokens=1_000_000, n=4), timeout=30,
        headers={"authorization": f"Bearer {KEY}"},
    ).json()  # fmt: skip
    ends = [(choice["finish_reason"], choice["end"]) for choice in found["choices"]]
    assert ends == [("length", "time")] * 4
    assert 0 < found["usage"]["completion_tokens"] < 4 * CONTEXT


def test_mistakes_at_the_start_are_one_line_each(server, checkpoint, tmp_path, script):
    """S8, S11, and what else cannot work."""
    (tmp_path / "short").write_text("abc")
    cases = {
        (checkpoint, "--host", "0.0.0.0"): "needs --api-key-file",
        (checkpoint, "--port", server.port): f"port {server.port}.* {server.process.pid}.*--port",
        (checkpoint, "--api-key-file", tmp_path / "short"): "16 ASCII characters",
        (checkpoint, "--index", tmp_path, "--port", 0): "no index.json",
        (checkpoint, "--lora", f"other={checkpoint}", "--port", 0): "wanted an adapter",
        (checkpoint, "--lora", checkpoint, "--port", 0): "two models are called 'small'",
        (checkpoint, "--slots", 0): "slots wants 1 or more, found 0",
        (tmp_path / "nothing", "--port", 0): "no such checkpoint",
    }
    for words, wanted in cases.items():
        assert re.search(wanted, script("serve/server.py", *words).error)


def test_running_replies_are_finished_before_the_server_ends(checkpoint, tmp_path):
    """By Ctrl-C here; the other servers of the tests are stopped as `kill` does."""
    with serving(checkpoint, tmp_path / "log") as server:
        sent = body(max_tokens=800, stream=True, messages=[{"role": "user", "content": TEXTS[0]}])
        with httpx.stream("POST", server.url + CHAT, json=sent, timeout=60) as found:
            lines = found.iter_lines()
            for _ in range(6):
                next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def test_a_fault_of_ours_ends_every_reply_and_the_server(tokenizer):
    def broken(tokens: object, cache: object) -> None:
        raise RuntimeError("a bug")

    engine = Engine(Decoder(endless_model(tokenizer), broken, "broken"), tokenizer, 2)
    stopped: list[bool] = []
    desk = Desk([engine], 8, 8, Metrics(), lambda: stopped.append(True))

    async def ask() -> None:
        desk.start(asyncio.get_running_loop())
        mailbox, ended = asyncio.Queue(), set()
        jobs = [Job([5, 6], SamplingConfig(max_new_tokens=9), print, n) for n in range(4)]
        desk.submit(engine, jobs, mailbox)
        async with asyncio.timeout(20):
            while len(ended) < 4:
                number, piece = await mailbox.get()
                if piece.reason:
                    assert piece.reason == "error" and number not in ended
                    ended.add(number)
        with pytest.raises(Refused, match="start the server again"):
            desk.submit(engine, jobs, mailbox)
        desk.stop()

    asyncio.run(ask())
    assert stopped == [True]
