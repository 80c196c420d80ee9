"""Images in the OpenAI interface, through OpenAI's own client and a real process."""

import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest

from babyllama.errors import ConfigError
from babyllama.sampling import SamplingConfig
from serve.models import serve_from
from serving import Running, answer, as_url, endless_model, save, seeing_model, serving
from tokenizer import Tokenizer
from vqa.model import Loaded, load

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")
CHAT = "/v1/chat/completions"
WHAT = "图片里是什么？"
GREEDY = {"temperature": 0, "max_tokens": 12}


def stored(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **more) -> bytes:
    image = PIL.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    out = io.BytesIO()
    image.convert(mode).save(out, kind, **more)
    return out.getvalue()


def asks(*urls: str, text: str = WHAT) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory):
    model = seeing_model(tokenizer).freeze(["encoder"])
    return save(model, tokenizer, tmp_path_factory.mktemp("seeing") / "small", "vqa")


@pytest.fixture(scope="module")
def server(run) -> Iterator[Running]:
    with serving(run, run.parent / "log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(run) -> Loaded:
    return load(run)


def said(client: openai.OpenAI, messages: list[dict], **more: object) -> str:
    found = client.chat.completions.create(model="small", messages=messages, **GREEDY | more)
    return found.choices[0].message.content


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_reply_is_what_the_chat_in_the_terminal_says(client, loaded, kind):
    data = stored(kind)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12, loop_guard="redraw")
    question = [{"role": "user", "content": WHAT}]
    wanted = answer(loaded, [data], question, sampling)
    messages = asks(as_url(data, kind.lower()))
    assert said(client, messages) == wanted != ""
    streamed = client.chat.completions.create(model="small", messages=messages, stream=True,
                                              **GREEDY)  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == wanted
    # The text may come in another order, and turns may follow.
    turned = [{"role": "user", "content": messages[0]["content"][::-1]}]
    assert said(client, turned) == wanted
    later = [*question, {"role": "assistant", "content": "不知道"}, *asks(as_url(data))]
    talk = [*question, {"role": "assistant", "content": "不知道"}, *question]
    assert said(client, later) == answer(loaded, [data], talk, sampling)


def test_replies_that_are_written_together_look_at_their_own_pictures(client):
    colours = [
        as_url(stored(size=(w, h))) for w, h in ((8, 8), (80, 10), (10, 80), (31, 33), (2, 2))
    ]
    colours += [as_url(_plain(c)) for c in ("white", "lime", "black")]
    alone = [said(client, asks(url)) for url in colours]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda url: said(client, asks(url)), colours)) == alone
    assert len(set(alone)) > 1


def _plain(colour: str) -> bytes:
    out = io.BytesIO()
    PIL.new("RGB", (20, 20), colour).save(out, "PNG")
    return out.getvalue()


def test_models_say_whether_they_take_pictures(client, server, loaded):
    (model,) = client.models.list()
    assert model.id == "small" and model.pictures is True
    settings = httpx.get(f"{server.url}/api/settings").json()
    assert settings["models"][0]["pictures"] is True
    found = client.chat.completions.create(model="small", messages=asks(as_url(stored())), **GREEDY)
    prompt = loaded.tokenizer.render_prompt([{"role": "user", "content": WHAT}])
    assert found.usage.prompt_tokens == len(prompt) + loaded.model.n_positions


def test_a_model_of_text_takes_no_pictures(tokenizer, tmp_path):
    run = save(endless_model(tokenizer), tokenizer, tmp_path / "text")
    with serving(run, tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["pictures"] is False
        found = httpx.post(server.url + CHAT, json={"messages": asks(as_url(stored()))})
    assert found.status_code == 400
    error = found.json()["error"]
    assert "this model takes no images" in error["message"] and error["param"] == "messages.0"


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        code = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


TURN = bytes.fromhex("0300 01000000 06000000")  # orientation 6
GOOD = {
    "one_pixel": stored(size=(1, 1)),
    "alpha": stored(mode="RGBA"),
    "cmyk": stored("JPEG", "CMYK"),
    "grey": stored(mode="L"),
    "bitmap": stored("BMP"),
    "turned": stored("JPEG", exif=bytes.fromhex("457869660000 49492a0008000000 0100 1201") + TURN),
}


@pytest.mark.parametrize("name", [*GOOD, "sixteen_bits", "animated"])
def test_pictures_of_all_kinds_are_looked_at(client, name):
    data = GOOD.get(name)
    out = io.BytesIO()
    if name == "sixteen_bits":
        PIL.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(out, "PNG")
    if name == "animated":
        frames = [PIL.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert said(client, asks(as_url(data or out.getvalue())))


URL = as_url(stored())
REFUSED = {
    "on_the_web": (asks("https://example.org/cat.png"), "not fetched from the network"),
    "inside": (asks("http://169.254.169.254/latest"), "not fetched from the network"),
    "a_file": (asks("file:///etc/passwd"), "not fetched from the network"),
    "a_path": (asks("/etc/passwd"), "not fetched from the network"),
    "a_text": (asks("data:text/plain;base64,aGk="), "wanted data:image"),
    "no_base64": (asks("data:image/png;base64,***"), "wanted base64"),
    "half_base64": (asks("data:image/png;base64,aGk"), "wanted base64"),
    "nothing": (asks("data:image/png;base64,"), "wanted an image"),
    "no_image": (asks(as_url(b"hello, I am text")), "that are none"),
    "drawing": (asks(as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml")), "none"),
    "cut_off": (asks(as_url(stored(size=(64, 64))[:120])), "cut off or damaged"),
    "bomb": (asks(as_url(png(20_000, 20_000, zlib.compress(bytes(10**6))))), "at most 50,000,000"),
    "endless": (asks(as_url(png(2**31 - 1, 2**31 - 1))), "wanted"),
    "no_pixels": (asks(as_url(png(0, 5))), "wanted"),
    "three": (asks(URL, URL, URL), "wanted one image, found 3"),
    "two_turns": ([*asks(URL), {"role": "assistant", "content": "马"}, *asks(URL)],
                  "wanted one image, found 2"),
    "none": ([{"role": "user", "content": WHAT}], "found a question without one"),
    "no_question": (asks(URL, text=" "), "is blank"),
    "of_the_model": ([*asks(URL), asks(URL)[0] | {"role": "assistant"}, *asks()],
                     "images come in messages of the user"),
    "too_long": (asks(URL, text="花" * 400), "the model's context is"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looked_at_is_refused_in_one_line(server, name):
    messages, fault = REFUSED[name]
    found = httpx.post(server.url + CHAT, json={"messages": messages, **GREEDY})
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert fault in error["message"] and error["message"].count("\n") == 0
    assert error["param"].startswith("messages") and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400  # what was sent is not sent back


def test_a_body_above_the_limit_is_refused_before_it_is_read(server):
    url = as_url(bytes(1_000_000))
    found = httpx.post(server.url + CHAT, json={"messages": asks(url), **GREEDY})
    assert found.status_code == 413 and "at most 1048576" in found.json()["error"]["message"]


def test_texts_are_not_continued_by_a_model_that_sees(client):
    with pytest.raises(openai.BadRequestError, match="ask it by /v1/chat/completions"):
        client.completions.create(model="small", prompt="今天", max_tokens=4)


def damaged(rng: random.Random) -> bytes:
    """A good image with some bytes changed, cut, doubled or moved."""
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    data = bytearray(stored(kind, size=(rng.randint(1, 70), rng.randint(1, 70))))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(max(1, len(data)))
        way = rng.randrange(4)
        if way == 0:
            data[place : place + 1] = rng.randbytes(1)
        elif way == 1:
            del data[place : place + rng.randint(1, 40)]
        elif way == 2:
            data[place:place] = data[place : place + rng.randint(1, 40)]
        else:
            data[min(place, 40) :][:4] = struct.pack(">I", rng.getrandbits(32))
            data[place : place + 4] = struct.pack(">I", rng.getrandbits(32))
    return bytes(data)


def test_damaged_pictures_get_an_answer_or_a_refusal_and_no_fault(server, client):
    rng = random.Random(0)
    counts = {200: 0, 400: 0}
    with httpx.Client(base_url=server.url) as sender:
        for _ in range(150):
            body = {"messages": asks(as_url(damaged(rng))), "max_tokens": 1, "temperature": 0}
            found = sender.post(CHAT, json=body)
            assert found.status_code in counts, found.text
            counts[found.status_code] += 1
        for _ in range(30):  # damage to the request itself
            text = bytearray(json.dumps({"messages": asks(URL), "max_tokens": 1}).encode())
            for _ in range(3):
                text[rng.randrange(len(text))] = rng.randrange(32, 127)
            found = sender.post(
                CHAT, content=bytes(text), headers={"content-type": "application/json"}
            )
            assert found.status_code in counts, found.text
    assert min(counts.values()) > 20, counts
    assert said(client, asks(URL))


def test_large_pictures_are_read_one_at_a_time(server):
    """Each takes 200 MB while it is read; the process does not grow by four of them."""

    def peak_mb() -> int:
        with open(f"/proc/{server.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024

    try:
        before = peak_mb()
    except OSError:
        pytest.skip("no /proc here")
    row = b"\0" + bytes(3 * 6000)
    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(row) for _ in range(6000)) + packed.flush()
    sent = {"messages": asks(as_url(png(6000, 6000, body))), "max_tokens": 1, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: httpx.post(server.url + CHAT, json=sent, timeout=60), "1234")
        )
    assert [answer.status_code for answer in found] == [200] * 4
    assert peak_mb() - before < 420


def test_what_a_model_that_sees_does_not_have_is_refused(run, tmp_path):
    settings = {"lora": (), "weights": "auto", "slots": 2, "device": "cpu"}
    (model,) = serve_from(SimpleNamespace(**settings), run).values()
    assert model.name == "small" and model.eyes.n_positions == 0
    for wrong in ({"lora": (str(tmp_path),)}, {"weights": "int8"}):
        with pytest.raises(ConfigError, match=r"--(lora|weights int8): .* leave --"):
            serve_from(SimpleNamespace(**settings | wrong), run)
