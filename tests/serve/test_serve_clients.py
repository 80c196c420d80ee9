"""Other programs' requests as their sources send them, and what browsers and proxies need."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from babyllama.config import REPO
from babyllama.cpu.decoder import make_decoder
from babyllama.scoring.summarise import suggest
from conftest import TEXTS
from serving import Running, endless_model, save, serving

CLIENTS = json.loads((REPO / "tests/fixtures/clients.json").read_text("utf-8"))
CHAT = "/v1/chat/completions"
SITE = "https://chat.example.org"


@pytest.fixture(scope="module")
def model(tokenizer):
    return endless_model(tokenizer, 512)


@pytest.fixture(scope="module")
def server(model, tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("clients")
    run = save(model, tokenizer, place / "small")
    flags = ("--allow-origin", SITE, "--per-client", "10", "--body-seconds", "3")
    with serving(run, place / "log", *flags) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", CLIENTS, ids=lambda asked: asked["client"])
def test_a_client_gets_what_it_reads(server, asked, stream):
    body = asked["body"] | {"stream": stream}
    if not stream:
        body.pop("stream_options", None)
    found = httpx.post(server.url + CHAT, json=body, headers=asked["headers"], timeout=60)
    assert found.status_code == 200, found.text
    if not stream:
        answer = found.json()
        assert answer["object"] == "chat.completion" and answer["model"] == "small"
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] >= 1
        return
    assert found.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in found.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert ends[-1] in ("stop", "length") and not any(ends[:-1])
    wants_usage = asked["body"].get("stream_options", {}).get("include_usage", False)
    assert wants_usage == (not chunks[-1]["choices"] and bool(chunks[-1]["usage"]))


def test_several_system_messages_are_one_reference_and_a_blank_one_is_none(server):
    def n_tokens(*messages: tuple[str, str]) -> int:
        body = {"messages": [dict(zip(("role", "content"), m, strict=True)) for m in messages]}
        found = httpx.post(server.url + CHAT, json=body | {"max_tokens": 1}).json()
        return found["usage"]["prompt_tokens"]

    asked = ("user", "你好")
    assert n_tokens(("system", " "), asked) == n_tokens(asked)
    assert n_tokens(("system", "一"), ("developer", "二"), asked) == n_tokens(
        ("system", "一\n二"), asked
    )


def test_a_title_is_that_of_the_terminal_and_of_scoring(server, model, tokenizer):
    decoder = make_decoder(model)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    for text in (TEXTS[0], TEXTS[3] * 40):
        wanted = suggest(decoder, tokenizer, text, 3)
        asked = {"model": "small", "messages": [{"role": "user", "content": text}]}
        found = client.chat.completions.create(**asked, n=3, extra_body={"task": "title"})
        assert [choice.message.content for choice in found.choices] == wanted.titles
        assert found.read == {"characters": wanted.n_read, "of": len(text)}
        titles = ["", "", ""]
        for chunk in client.chat.completions.create(
            **asked, n=3, stream=True, extra_body={"task": "title"}
        ):
            for choice in chunk.choices:
                titles[choice.index] += choice.delta.content or ""
        assert titles == wanted.titles
        one = client.chat.completions.create(**asked, extra_body={"task": "title"})
        assert [choice.message.content for choice in one.choices] == wanted.titles[:1]
    for more, param in (
        ({"temperature": 0.5}, "temperature"), ({"n": 5}, "n"), ({"reference": "x"}, "reference"),
        ({"messages": [*asked["messages"], *asked["messages"]]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0"),
        ({"task": "poem"}, "task"),
    ):  # fmt: skip
        body = asked | {"task": "title"} | more
        refused = httpx.post(server.url + CHAT, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_loops_are_guarded_against_unless_a_request_says_otherwise(server):
    body = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 300}

    def said(**more: object) -> str:
        found = httpx.post(server.url + CHAT, json=body | more, timeout=60).json()
        return found["choices"][0]["message"]["content"]

    assert said() == said(loop_guard="redraw") != said(loop_guard="off")


@pytest.mark.parametrize(
    "method, path, wanted",
    [
        ("POST", "/v1/embeddings", "this server has POST /v1/chat/completions"),
        ("POST", "/v1/responses", "this server has POST /v1/chat/completions"),
        ("POST", "/chat/completions", "the base URL ends with /v1: /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "the base URL ends with /v1"),
        ("GET", "/models", "the base URL ends with /v1: /v1/models"),
        ("GET", "/v1/chat/completions", "wanted POST"),
    ],
)
def test_a_path_that_is_not_there_says_what_is(server, method, path, wanted):
    found = httpx.request(method, server.url + path, json={} if method == "POST" else None)
    assert found.status_code == (405 if wanted == "wanted POST" else 404)
    error = found.json()["error"]
    assert wanted in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_without_its_header_and_a_name_of_docker_are_told_what_to_do(server):
    found = httpx.post(server.url + CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in found.json()["error"]["message"]
    found = httpx.get(f"{server.url}/v1/models", headers={"host": "host.docker.internal:8000"})
    assert found.status_code == 403
    assert "--host 0.0.0.0 --api-key-file FILE" in found.json()["error"]["message"]


def test_a_site_that_is_allowed_may_ask_from_a_browser_and_no_other(server):
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    found = httpx.options(server.url + CHAT, headers={"origin": SITE} | asked)
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == SITE
    assert "x-stainless-os" in found.headers["access-control-allow-headers"]
    assert "POST" in found.headers["access-control-allow-methods"]
    body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
    for path, status in ((CHAT, 200), ("/v1/embeddings", 404)):
        found = httpx.post(server.url + path, json=body, headers={"origin": SITE})
        assert found.status_code == status
        assert found.headers["access-control-allow-origin"] == SITE
        assert found.headers["cross-origin-resource-policy"] == "cross-origin"
    other = httpx.options(server.url + CHAT, headers={"origin": "https://evil.example"} | asked)
    assert other.status_code == 403 and "--allow-origin" in other.json()["error"]["message"]
    assert "access-control-allow-origin" not in other.headers


def test_an_origin_that_is_none_is_a_mistake_at_the_start(script, tmp_path):
    for wrong in ("chat.example.org", "https://a.example/path", "https://"):
        done = script("serve/server.py", tmp_path, "--allow-origin", wrong)
        assert "with scheme and without a path" in done.error


def test_a_body_that_is_too_large_is_refused_where_ordinary_clients_read_it(server):
    for size in (2 << 20, 30 << 20):
        request = urllib.request.Request(
            server.url + CHAT, b"x" * size, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
        assert refused.value.code == 413
        assert json.loads(refused.value.read())["error"]["code"] == "body_too_large"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.APIStatusError) as refused:
        messages = [{"role": "user", "content": "长" * (1 << 20)}]
        client.chat.completions.create(model="small", messages=messages)
    assert refused.value.status_code == 413


def test_a_client_that_asks_before_it_sends_is_told_at_once(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                     b"Content-Length: 99999999\r\n\r\n")  # fmt: skip
        assert sock.recv(30).startswith(b"HTTP/1.1 413")


def test_more_replies_than_one_client_may_have_are_no_matter_of_waiting(server):
    body = {"prompt": ["今天"] * 8, "n": 8, "max_tokens": 1}
    found = httpx.post(f"{server.url}/v1/completions", json=body)
    assert found.status_code == 400 and found.json()["error"]["param"] == "n"
    assert "at most 10 replies" in found.json()["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address for themselves")
def test_silent_connections_of_one_address_keep_nobody_out(server):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(520)]
    body = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
    for address in ("127.0.0.2", "127.0.0.1"):
        transport = httpx.HTTPTransport(local_address=address)
        with httpx.Client(transport=transport, timeout=10) as client:
            assert client.post(server.url + CHAT, json=body).status_code == 200
    started = time.monotonic()
    for sock in silent:
        sock.settimeout(20)
        assert sock.recv(1) == b""
        sock.close()
    assert time.monotonic() - started < 10


def test_a_small_answer_on_a_used_connection_is_not_held_back(server):
    """Nagle's algorithm beside a delayed acknowledgement takes 40 ms of each."""
    with httpx.Client() as client:
        client.get(f"{server.url}/health")
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            client.get(f"{server.url}/health")
            seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.03, sorted(seconds)


def test_a_server_without_files_to_open_says_so_once(model, tokenizer, tmp_path):
    run = save(model, tokenizer, tmp_path / "small")
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
        "sys.argv = ['serve.server', sys.argv[1], '--port', '0', '--wiki-url=']; "
        "runpy.run_module('serve.server', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    lines = [process.stdout.readline()]
    while not lines[-1].startswith("http"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    port = int(re.search(r":(\d+)", lines[-1])[1])
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    time.sleep(2.5)
    for sock in held:
        sock.close()
    time.sleep(1.5)
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert said.count("no file is left to open") == 1 and len(said.splitlines()) < 20, said


def test_a_pdf_that_never_ends_is_given_up(server, tmp_path: Path):
    pytest.importorskip("pypdf", reason="pip install -r requirements/serve.txt")
    for data in (
        b"%PDF-1.7\n",
        b"%PDF-1.4\ntrailer << /Root 1 0 R /Prev 9 >>\nstartxref\n9\n%%EOF",
    ):
        found = httpx.post(f"{server.url}/api/text", content=data, timeout=60,
                           headers={"content-type": "application/pdf"})  # fmt: skip
        assert found.status_code == 400 and found.json()["error"]["code"] == "unreadable"
