"""What the chat page offers beside talking, in a real browser: models, 资料, copying, settings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from babyllama import lora
from babyllama.lora import LoraConfig
from babyllama.retrieval.index import build
from browsing import ask, needs_browser, reload, until, visitor
from conftest import save_adapter
from serving import Running, endless_model, save, serving
from test_index import write_articles
from test_retrieval import server as wiki  # noqa: F401

pytestmark = needs_browser
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    return save(endless_model(tokenizer), tokenizer, tmp_path_factory.mktemp("page") / "small")


@pytest.fixture(scope="module")
def server(checkpoint, tokenizer, tmp_path_factory) -> Iterator[Running]:
    """It wants a key, and has an adapter and an index."""
    place = tmp_path_factory.mktemp("tools")
    (place / "key").write_text(KEY)
    adapted = lora.apply_lora(endless_model(tokenizer), LoraConfig(rank=2))
    with torch.no_grad():
        for weight in lora.stored(adapted).values():
            weight.normal_(std=0.3)
    save_adapter(adapted, place / "other")
    build([write_articles(place / "rows.jsonl")], place / "index", "wiki")
    flags = {"--api-key-file": "key", "--lora": "other", "--index": "index"}
    words = [word for flag, name in flags.items() for word in (flag, str(place / name))]
    with serving(checkpoint, place / "log", *words) as server:
        yield server


@pytest.fixture
def page(browser, server):
    allowed = ["clipboard-read", "clipboard-write"]
    with visitor(browser, server.url, KEY, permissions=allowed) as page:
        yield page


def sent_with(page, question: str) -> dict:
    """What the server is sent with a question, and the whole reply awaited."""
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, question)
    return json.loads(request.value.post_data)


def test_a_key_is_asked_for_and_a_wrong_one_does_not_open(browser, server):
    with visitor(browser, server.url, KEY) as page:
        page.click("#open-settings")
        page.fill("#key", "another")
        page.press("#key", "Tab")
        page.wait_for_selector("#notice:not([hidden])")
        assert "密钥" in page.locator("#notice").text_content()
        page.fill("#key", f" {KEY} ")
        page.press("#key", "Tab")
        until(page, "document.querySelector('#notice').hidden")
        assert ask(page, "你好")


def test_the_model_that_is_chosen_answers_and_stays_chosen(page):
    page.evaluate("state.sampling.seed = '3'")
    assert page.locator("#model option").all_text_contents() == ["small", "other"]
    replies = {}
    for name in ("small", "other"):
        page.click("#fresh")
        page.select_option("#model", name)
        assert sent_with(page, "你好")["model"] == name
        replies[name] = page.locator("#messages li.assistant .text").text_content()
    assert replies["small"] != replies["other"]
    reload(page)
    assert page.locator("#model").input_value() == "other"


def test_what_is_looked_up_becomes_the_reference(page):
    page.click("#reference-box summary")
    page.fill("#term", "镍")
    page.press("#term", "Enter")
    until(page, "document.querySelector('#reference').value.includes('铁磁性')")
    assert "《镍》" in page.locator("#found").text_content()
    reference = page.locator("#reference").input_value()
    assert sent_with(page, "镍有什么用？")["reference"] == reference
    page.fill("#term", "量子纠缠")
    page.click("#look-up")
    until(page, "document.querySelector('#found').textContent.includes('量子纠缠')")
    assert page.locator("#reference").input_value() == reference  # nothing was found


def test_questions_are_looked_up_and_the_sources_shown(page):
    page.click("#reference-box summary")
    page.check("#retrieve")
    assert page.locator("#reference").is_disabled()
    assert sent_with(page, "银杏的叶子什么时候变黄？")["retrieve"] is True
    page.click("#messages .sources summary")
    shown = page.locator("#messages .sources p").first
    assert shown.is_visible() and "《银杏》" in shown.text_content()
    ask(page, "zzz qqq")
    last = page.locator("#messages li").last
    assert "没有找到合适的资料" in last.text_content() and last.locator(".sources").count() == 0


def test_wikipedia_is_asked_where_there_is_no_index(
    browser, checkpoint, tmp_path, monkeypatch, wiki  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{wiki.server_port}/w/api.php"
    with (
        serving(checkpoint, tmp_path / "log", "--wiki-url", address) as server,
        visitor(browser, server.url) as page,
    ):
        assert page.locator("#retrieve-line").is_hidden()
        page.click("#reference-box summary")

        def look_up(term: str, shown: str) -> None:
            page.fill("#term", term)
            page.press("#term", "Enter")
            until(page, f"document.querySelector('#found').textContent.includes({shown!r})")

        look_up("苹果", "有多个含义")
        page.get_by_role("button", name="苹果公司").click()
        until(page, "document.querySelector('#reference').value === '苹果公司是一家美国公司。'")
        assert "https://wiki/苹果公司" in page.locator("#found").text_content()
        assert page.locator("#choices button").count() == 0
        for term, shown in (("苹果派", "相近的有"), ("虚无", "没有“虚无”"), ("坏", "不是 JSON")):
            look_up(term, shown)
        assert page.locator("#reference").input_value() == "苹果公司是一家美国公司。"


def test_a_message_is_copied(page):
    reply = ask(page, "一\n二")
    for number, wanted in ((0, "一\n二"), (1, reply)):
        page.get_by_role("button", name="复制").nth(number).click()
        page.wait_for_selector("button:has-text('已复制')")
        assert page.evaluate("navigator.clipboard.readText()") == wanted
        until(page, "!document.body.textContent.includes('已复制')")


def test_what_the_sliders_say_is_asked_for(page):
    page.click("#open-settings")
    wanted = {"temperature": 0.45, "top_p": 0.95, "repetition_penalty": 1.01}
    for name, key in zip(wanted, ("ArrowLeft", "ArrowRight", "ArrowRight"), strict=True):
        page.focus(f"#{name}")
        page.keyboard.press(key)
        assert page.locator(f"label[for={name}] output").text_content() == str(wanted[name])
    page.fill("#seed", "7")
    page.select_option("#loop_guard", "redraw")
    page.click("#close-settings")
    sent = sent_with(page, "你好")
    assert wanted | {"seed": 7, "loop_guard": "redraw"} == {
        name: sent[name] for name in (*wanted, "seed", "loop_guard")
    }
    page.click("#open-settings")
    page.click("#reset")
    page.click("#close-settings")
    sent = sent_with(page, "你好")
    assert sent["temperature"] == 0.5 and "seed" not in sent


def test_a_visitor_finds_his_own_language_and_colours(browser, server):
    with visitor(browser, server.url, KEY, locale="en-GB", color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.locator("#welcome .hello").text_content() == "Say something"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        until(page, f"getComputedStyle(document.body).backgroundColor !== {dark!r}")
        page.click("#open-settings")
        page.select_option("#theme", "dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
