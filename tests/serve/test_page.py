"""The chat page in a real browser, before a real server."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from browsing import ask, needs_browser, put_talk, ready, reload, texts, until, visitor
from conftest import TEXTS
from serving import Running, save, serving, talkative_model

pytestmark = needs_browser


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("page")
    model = talkative_model(tokenizer)
    with serving(save(model, tokenizer, place / "small"), place / "log") as server:
        yield server


@pytest.fixture
def page(browser, server):
    with visitor(browser, server.url) as page:
        yield page


def set_length(page, tokens: int) -> None:
    page.evaluate(f"state.sampling.max_tokens = {tokens}")


def test_a_conversation_is_shown_as_the_server_wrote_it(page, server):
    page.evaluate("state.sampling.seed = '5'; state.sampling.temperature = 0.9")
    first = ask(page, "你好")
    second = ask(page, "再说一次\n好吗？")
    messages = [{"role": "user", "content": "你好"}]
    for reply, question in ((first, "再说一次\n好吗？"), (second, "")):
        found = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"messages": messages, "max_tokens": 12, "seed": 5, "temperature": 0.9},
        ).json()
        assert reply == found["choices"][0]["message"]["content"] != ""
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
    assert texts(page) == ["你好", first, "再说一次\n好吗？", second]
    assert page.locator("#question").input_value() == ""
    assert "回答完成" in page.locator("#status").text_content()


def test_a_stop_keeps_what_came_and_frees_the_server(page, server):
    set_length(page, 4000)
    page.fill("#question", "讲一个很长的故事")
    page.press("#question", "Enter")
    until(page, "document.querySelector('.writing .text')?.textContent.length > 30")
    page.keyboard.press("Escape")
    until(page, "!writing")
    text = texts(page)[-1]
    assert len(text) > 30 and "已停止" in page.locator("#messages li").last.text_content()
    until(page, "fetch('/metrics').then(r => r.text()).then(t => /open_replies 0/.test(t))")
    assert texts(page)[-1] == text
    assert page.locator("#send").is_visible() and not page.locator("#stop").is_visible()


def test_a_reload_keeps_the_conversation_and_the_settings(page):
    ask(page, "你好")
    page.click("#reference-box summary")
    page.fill("#reference", TEXTS[0])
    page.click("#open-settings")
    page.select_option("#theme", "dark")
    page.select_option("#loop_guard", "end")
    before = texts(page)
    reload(page)
    assert texts(page) == before
    assert page.locator("#reference").input_value() == TEXTS[0]
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("state.sampling.loop_guard") == "end"
    page.click("#fresh")
    assert texts(page) == [] and page.locator("#welcome").is_visible()


PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>",
    "javascript:alert(1)", "<iframe srcdoc='<script>parent.alert(1)</script>'>", "${alert(1)}",
    "<a href='javascript:alert(1)'>x</a>", "</textarea><script>alert(1)</script>", "&lt;b&gt;",
    "<style>*{display:none}</style>", "<base href='//evil.example'>", "<b>粗</b>", "{{7*7}}",
    "<math><mtext></math><img src=x onerror=alert(1)>", "]]><script>alert(1)</script>",
    "<details open ontoggle=alert(1)>", "<form action=//evil.example><input name=q autofocus>",
    "\u202e<script>alert(1)</script>", "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
]  # fmt: skip


def test_text_never_becomes_part_of_the_page(page):
    """S9: as the user's message, as the model's, as 资料, as its source, and out of the store."""
    before = page.evaluate("document.querySelectorAll('*').length")
    ask(page, "\n".join(PAYLOADS), tokens=6)
    assert texts(page)[0] == "\n".join(PAYLOADS)
    messages = [
        {"role": role, "content": text, "end": "eos", "sources": [{"citation": text, "text": text}]}
        for text in PAYLOADS
        for role in ("user", "assistant")
    ]
    put_talk(page, {"messages": messages, "reference": PAYLOADS[0], "title": PAYLOADS[1]})
    reload(page)
    assert texts(page) == [message["content"] for message in messages]
    assert (
        page.locator("#messages :is(script, img, svg, iframe, a, b, style, form, link)").count()
        == 0
    )
    page.click("#fresh")
    assert page.evaluate("document.querySelectorAll('*').length") <= before + 30


def test_a_message_can_be_edited_and_a_reply_written_again(page):
    ask(page, "第一")
    ask(page, "第二")
    again = page.get_by_role("button", name="重新回答")
    assert again.count() == 1
    again.click()
    until(page, "!writing && document.querySelectorAll('#messages li').length === 4")
    page.get_by_role("button", name="编辑").first.click()
    page.locator(".editing textarea").fill("改过的")
    page.locator(".editing textarea").press("Enter")
    until(page, "!writing && document.querySelectorAll('#messages li').length === 2")
    assert texts(page)[0] == "改过的"


def test_what_is_being_edited_cannot_cut_off_a_reply(page):
    ask(page, "第一")
    page.get_by_role("button", name="编辑").first.click()
    page.locator(".editing textarea").fill("改过的")
    reply = ask(page, "第二")
    assert page.locator(".editing").count() == 0
    assert [text for text in texts(page) if text != "改过的"] == texts(page)
    assert len(texts(page)) == 4 and texts(page)[2:] == ["第二", reply]


def test_a_damaged_store_loses_what_is_damaged_and_nothing_else(page):
    good = {"role": "user", "content": "还在"}
    bad = [None, 1, {}, {"role": "user"}, {"role": "x", "content": "y"}, good | {"sources": 7}]
    for kept in (
        {"sampling": None, "theme": 1, "language": "fr", "key": 7, "model": []}, [], None, "{", 7,
        {"sampling": {"temperature": "x", "top_p": None, "loop_guard": "?", "seed": {}}},
        {"theme": "dark", "language": "constructor", "key": "密\n钥", "sampling": []},
    ):  # fmt: skip
        text = kept if isinstance(kept, str) else json.dumps(kept)
        page.evaluate("kept => localStorage.setItem('babyllama.1', kept)", text)
        reload(page)
        assert page.evaluate("[state.sampling.temperature, state.sampling.loop_guard]") == [
            0.5, "redraw",
        ]  # fmt: skip
        assert ask(page, "你好")
    for messages, wanted in (([*bad, good], ["还在"] * 2), ("x", []), ({}, []), (None, [])):
        put_talk(page, {"messages": messages, "title": 7, "created": "x"})
        reload(page)
        assert texts(page) == wanted


def test_the_conversation_of_an_older_page_is_kept(page):
    older = {"messages": [{"role": "user", "content": "以前的"}], "reference": "旧资料"}
    page.evaluate("kept => localStorage.setItem('babyllama.1', kept)", json.dumps(older))
    for _ in range(2):
        reload(page)
        assert texts(page) == ["以前的"]
        assert page.locator("#reference").input_value() == "旧资料"
    assert page.locator("#talks li").count() == 1


def test_a_browser_that_stores_nothing_still_talks(browser, server):
    forbid = """
        Object.defineProperty(window, "localStorage", { get() { throw new Error("no"); } });
        Object.defineProperty(window, "sessionStorage", { get() { throw new Error("no"); } });
        Object.defineProperty(window, "indexedDB", { get() { throw new Error("no"); } });
    """
    context = browser.new_context(locale="zh-CN")
    context.add_init_script(forbid)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    ready(page)
    assert "只保留到关闭" in page.locator("#toast").text_content()
    assert ask(page, "你好") and not faults
    page.click("#fresh")
    assert texts(page) == [] and page.locator("#talks li").count() == 1
    context.close()


def test_a_conversation_is_exported_whole(page):
    reply = ask(page, "你好")
    page.click("#reference-box summary")
    page.fill("#reference", "一段资料")
    page.click("#open-settings")
    with page.expect_download() as download:
        page.click("[data-export=this] button:text-is('.jsonl')")
    with open(download.value.path(), encoding="utf-8") as file:
        row = json.loads(file.read())
    assert row["messages"] == [
        {"role": "system", "content": "一段资料"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": reply},
    ]  # fmt: skip
    with page.expect_download() as download:
        page.click("[data-export=this] button:text-is('.md')")
    with open(download.value.path(), encoding="utf-8") as file:
        assert reply in file.read()


def test_strange_text_goes_through_the_page_unharmed(page):
    controls = "".join(map(chr, [*range(1, 10), 11, *range(14, 32), 0x7F, 0x80, 0x9F]))
    strange = f"\u202egpj.exe\u202c 👩‍👩‍👧‍👦 𠮷 {controls} " + "x" * 1000 + " a\tb"
    ask(page, strange, tokens=6)
    assert texts(page)[0] == strange
    word = "Llanfair" * 2048
    page.fill("#question", word)
    page.press("#question", "Enter")
    page.wait_for_selector("#notice:not([hidden])")  # the model's context is shorter
    assert re.search(r"太长：共 \d+ 个 token.*4096", page.locator("#notice").text_content())
    assert texts(page)[-1] == word
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_the_server_refuses_is_said_and_can_be_tried_again(page):
    page.evaluate("state.sampling.temperature = 99")
    page.fill("#question", "你好")
    page.press("#question", "Enter")
    page.wait_for_selector("#notice:not([hidden])")
    assert "temperature" in page.locator("#notice").text_content()
    page.evaluate("state.sampling.temperature = 0.5; state.sampling.max_tokens = 8")
    page.click("#retry")
    until(page, "!writing && document.querySelectorAll('#messages li').length === 2")
    assert page.locator("#notice").is_hidden()


def test_a_phone_shows_everything_in_its_width(page):
    page.set_viewport_size({"width": 360, "height": 640})
    ask(page, "在手机上" * 40, tokens=60)
    for opened in ("#reference-box summary", "#open-settings"):
        page.click(opened)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("#close-settings")
    assert page.locator("#question").bounding_box()["width"] > 200
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
    assert min(box["width"], box["height"]) >= 36


def test_both_languages_name_every_control(page):
    for wanted in ("zh-CN", "en", "zh-CN"):
        assert page.evaluate("document.documentElement.lang") == wanted
        page.click("#open-settings")
        controls = page.locator("button, input, select, textarea")
        nameless = controls.evaluate_all(
            "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() ||"
            " e.labels?.[0]?.textContent.trim())).map(e => e.id)"
        )
        assert nameless == []
        assert "undefined" not in page.content()
        page.click("#close-settings")
        page.click("#language")


def test_the_page_can_be_used_by_keyboard_alone(page):
    assert page.evaluate("document.activeElement.id") == "question"
    set_length(page, 5)
    page.keyboard.type("你好")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("吗")
    page.keyboard.press("Enter")
    until(page, "!writing && document.querySelectorAll('#messages li').length === 2")
    assert texts(page)[0] == "你好\n吗"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {
        "fresh",
        "language",
        "open-settings",
        "question",
        "send",
        "复制",
        "编辑",
        "重新回答",
    } <= seen
    assert re.search(r"说点什么吧", page.content())
