"""Images in the chat page: a real browser before a real server whose model sees."""

import io
import json
from collections.abc import Iterator

import httpx
import pytest

from browsing import needs_browser, put_talk, ready, reload, until, visitor
from serving import Running, as_url, endless_model, save, seeing_model, serving

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")
pytestmark = needs_browser
WHAT = "图片里是什么？"


def stored(colour: str, size: tuple[int, int] = (32, 32), kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image = PIL.effect_noise(size, 60) if colour == "noise" else PIL.new("RGB", size, colour)
    image.convert("RGB").save(out, kind, **more)
    return out.getvalue()


def as_file(name: str, data: bytes) -> dict:
    kind = name.rsplit(".", 1)[1].replace("jpg", "jpeg")
    return {"name": name, "mimeType": f"image/{kind}", "buffer": data}


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("page")
    model = seeing_model(tokenizer, context=2048).freeze(["encoder"])
    with serving(save(model, tokenizer, place / "small", "vqa"), place / "log") as server:
        yield server


@pytest.fixture
def page(browser, server):
    with visitor(browser, server.url) as page:
        page.evaluate("Object.assign(state.sampling, {temperature: 0, max_tokens: 8})")
        yield page


def add(page, name: str, data: bytes) -> None:
    page.set_input_files("#picture-file", as_file(name, data))
    page.wait_for_selector("#picture img[src]")


def ask(page, text: str) -> tuple[list[dict], str]:
    """What was sent and what came."""
    page.fill("#question", text)
    with page.expect_request("**/v1/chat/completions") as request:
        page.press("#question", "Enter")
    until(page, "!writing")
    reply = page.locator("#messages li.assistant .text").last.text_content()
    return json.loads(request.value.post_data)["messages"], reply


def pictures_in(messages: list[dict]) -> list[str]:
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def test_a_picture_is_shown_sent_and_answered(page, server):
    data = stored("red")
    assert page.locator("#add-picture").is_visible() and page.locator("#picture").is_hidden()
    add(page, "red.png", data)
    messages, reply = ask(page, WHAT)
    assert pictures_in(messages) == [as_url(data)]  # small ones go as they are
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert reply == found["choices"][0]["message"]["content"] != ""
    shown = page.locator("#messages li.user img")
    assert shown.count() == 1 and shown.get_attribute("alt") == "图片"
    assert shown.evaluate("e => e.naturalWidth") == 32
    assert page.locator("#picture").is_hidden()  # it went with the message
    # The next question is about the same image, also after a reload.
    reload(page)
    messages, _ = ask(page, "这是动物吗？")
    assert pictures_in(messages) == [as_url(data)] and len(messages) == 3


def test_a_new_picture_begins_anew_for_the_model(page):
    add(page, "red.png", stored("red"))
    ask(page, WHAT)
    add(page, "blue.png", stored("blue"))
    messages, _ = ask(page, WHAT)
    assert pictures_in(messages) == [as_url(stored("blue"))] and len(messages) == 1
    assert page.locator("#messages img").count() == 2 and page.locator("#notice").is_hidden()
    page.get_by_role("button", name="编辑").last.click()
    page.locator(".editing textarea").fill("改过的")
    with page.expect_request("**/v1/chat/completions") as request:
        page.locator(".editing textarea").press("Enter")
    messages = json.loads(request.value.post_data)["messages"]
    assert pictures_in(messages) == [as_url(stored("blue"))]
    until(page, "!writing")


def test_a_question_without_a_picture_asks_for_one(page):
    page.fill("#question", WHAT)
    page.press("#question", "Enter")
    assert "请先添加一张图片" in page.locator("#notice").text_content()
    assert page.locator("#messages li").count() == 0
    assert page.locator("#question").input_value() == WHAT
    add(page, "red.png", stored("red"))
    page.click("#remove-picture")
    assert page.locator("#picture").is_hidden() and page.evaluate("picture") == ""
    add(page, "red.png", stored("red"))  # the same file again
    assert page.locator("#notice").is_hidden()
    _, reply = ask(page, " ")  # an image alone is a question
    assert reply and page.locator("#messages li.user .text").text_content() == WHAT


def test_large_turned_and_other_pictures_are_made_fit_by_the_page(page):
    exif = PIL.Exif()
    exif[0x0112] = 6
    turned = stored("red", (64, 32), "JPEG", exif=exif)
    for name, data, size in (
        ("photo.jpg", stored("noise", (1600, 1200), "JPEG"), (768, 576)),
        ("long.png", stored("noise", (2500, 500)), (768, 154)),
        ("a.bmp", stored("red", (20, 10), "BMP"), (20, 10)),
        ("turned.jpg", turned, (32, 64)),
    ):
        add(page, name, data)
        messages, reply = ask(page, WHAT)
        (url,) = pictures_in(messages)
        assert len(url) < 900_000 and reply
        shown = page.locator("#messages img").last
        found = shown.evaluate("async e => (await e.decode(), [e.naturalWidth, e.naturalHeight])")
        assert tuple(found) == size


@pytest.mark.parametrize("data", [b"no image", b"", stored("red", (64, 64))[:60]])
def test_files_that_are_no_pictures_are_refused_by_the_page(page, data):
    page.set_input_files("#picture-file", as_file("x.png", data))
    page.wait_for_selector("#notice:not([hidden])")
    assert "不是能打开的图片" in page.locator("#notice").text_content()
    assert page.locator("#picture").is_hidden()


def test_what_is_kept_is_shown_only_if_it_is_a_picture(page):
    bad = ["javascript:alert(1)", "https://evil.example/x.png", "data:text/html,<b>x", {"a": 1},
           "data:image/svg+xml;base64,PHN2Zy8+"]  # fmt: skip
    messages = [{"role": "user", "content": "x", "picture": url} for url in bad]
    put_talk(page, {"messages": messages})
    reload(page)
    assert page.locator("#messages li").count() == len(bad)
    assert page.locator("#messages img").count() == 0


def test_a_phone_shows_the_picture_in_its_width(page):
    page.set_viewport_size({"width": 360, "height": 640})
    add(page, "wide.png", stored("noise", (2000, 200)))
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        box = page.locator("#send").bounding_box()
        assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
        ask(page, WHAT * 8)


def test_a_model_of_text_shows_no_button(browser, tokenizer, tmp_path):
    run = save(endless_model(tokenizer), tokenizer, tmp_path / "text")
    with serving(run, tmp_path / "log") as text:
        page = browser.new_page()
        page.goto(text.url)
        ready(page)
        assert page.locator("#add-picture").is_hidden() and page.locator("#picture").is_hidden()
        page.close()
