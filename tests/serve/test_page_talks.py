"""Conversations in the chat page, titles, documents: a real browser, before a real server."""

import io
import json
import zipfile
from collections.abc import Iterator

import httpx
import pytest

from browsing import ask, needs_browser, put_talk, ready, reload, texts, until, visitor
from conftest import TEXTS
from serving import Running, save, serving, talkative_model

pytestmark = needs_browser
SIZES = {"wide": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("talks")
    run = save(talkative_model(tokenizer, 512), tokenizer, place / "small")
    card = "# 模型卡\n\n会*写标题*，<script>alert(1)</script>不会别的。\n"
    (run / "README.md").write_text(card, "utf-8")
    with serving(run, place / "log") as server:
        yield server


on_each_size = pytest.mark.parametrize("page", SIZES, indirect=True)


@pytest.fixture
def page(request, browser, server):
    allowed = ["clipboard-read", "clipboard-write"]
    size = SIZES[getattr(request, "param", "wide")]
    with visitor(browser, server.url, viewport=size, permissions=allowed) as page:
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def open_list(page) -> None:
    if page.evaluate("document.documentElement.dataset.list") != "open":
        page.click("#open-list")


def titles(page) -> list[str]:
    return page.locator("#talks .name").all_text_contents()


def fresh(page) -> None:
    page.click("#fresh")
    until(page, "talk.messages.length === 0")


@on_each_size
def test_conversations_are_listed_found_renamed_and_opened_again(page):
    ask(page, "第一个话题", tokens=6)
    fresh(page)
    ask(page, "第二个 鸵鸟", tokens=6)
    open_list(page)
    assert titles(page) == ["第二个 鸵鸟", "第一个话题"]
    page.get_by_role("button", name="改名: 第一个话题").click()
    page.locator("#talks input").fill("改过的名字")
    page.locator("#talks input").press("Enter")
    page.wait_for_selector("#talks .name:text-is('改过的名字')")
    page.fill("#search", "鸵鸟")  # of no token, so that no reply says it
    until(page, "document.querySelectorAll('#talks li').length === 1")
    page.locator("#talks .name").click()
    until(page, "talk.messages[0]?.content === '第二个 鸵鸟'")
    until(page, "!narrow() || document.documentElement.dataset.list === 'closed'")
    open_list(page)
    page.fill("#search", "没有的话")
    until(page, "!document.querySelector('#no-talks').hidden")
    assert page.locator("#no-talks").text_content() == "没有找到"
    page.fill("#search", "")
    until(page, "document.querySelectorAll('#talks li').length === 2")
    reload(page)
    assert texts(page)[0] == "第二个 鸵鸟"
    open_list(page)
    assert sorted(titles(page)) == ["改过的名字", "第二个 鸵鸟"]


def test_a_deleted_conversation_can_be_had_back(page):
    reply = ask(page, "要留下的", tokens=6)
    open_list(page)
    page.get_by_role("button", name="删除: 要留下的").click()
    until(page, "document.querySelectorAll('#talks li').length === 0 && !talk.messages.length")
    page.click("#toast button")
    until(page, "document.querySelectorAll('#talks li').length === 1")
    assert texts(page) == ["要留下的", reply]
    reload(page)
    assert texts(page) == ["要留下的", reply]
    open_list(page)
    page.get_by_role("button", name="删除: 要留下的").click()
    until(page, "document.querySelectorAll('#talks li').length === 0")
    reload(page)
    assert texts(page) == [] and titles(page) == []


def test_two_tabs_do_not_overwrite_each_other(page):
    ask(page, "开头", tokens=6)
    other = page.context.new_page()
    other.goto(page.url)
    ready(other)
    assert texts(other) == []  # a tab of its own begins a conversation of its own
    open_list(other)
    other.locator("#talks .name").click()
    until(other, "talk.messages.length === 2")
    ask(other, "从另一页", tokens=6)
    until(page, "talk.messages.length === 4")  # this one follows
    # Both at once: what the one has not seen yet is not lost to the other.
    other.evaluate("saving")
    page.evaluate(
        """(async () => {
            store.onChange(() => {});
            await othersChanged(talk.id); // what was under way is over with it
            talk.version -= 1;
        })()"""
    )
    ask(page, "从这一页", tokens=6)
    until(page, "$('toast').textContent.includes('两份都保留了')")
    kept = page.evaluate(
        "(async () => { const all = []; await store.each(t => all.push(t.messages.map(m => "
        "m.content))); return all; })()"
    )
    assert len(kept) == 2
    assert sum("从这一页" in said for said in kept) == 1
    assert all("从另一页" in said for said in kept)
    other.close()


def test_a_draft_outlives_a_reload_and_belongs_to_its_conversation(page):
    page.fill("#question", "还没写完")
    reload(page)
    assert page.locator("#question").input_value() == "还没写完"
    ask(page, "发出去", tokens=6)
    page.fill("#question", "第二句的草稿")
    fresh(page)
    assert page.locator("#question").input_value() == ""
    open_list(page)
    page.locator("#talks .name").click()
    until(page, "talk.messages.length === 2")
    assert page.locator("#question").input_value() == "第二句的草稿"


def test_a_reference_belongs_to_its_conversation_and_shows_as_a_chip(page):
    page.click("#reference-box summary")
    page.fill("#reference", TEXTS[0])
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "公园里有什么？", tokens=6)
    assert json.loads(request.value.post_data)["reference"] == TEXTS[0]
    chip = page.locator("#reference-box.chip summary")
    assert f"{len(TEXTS[0])} 字" in chip.text_content()
    fresh(page)
    assert page.locator("#reference-box.chip").count() == 0
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "你好", tokens=6)
    assert "reference" not in json.loads(request.value.post_data)
    open_list(page)
    page.locator("#talks .name", has_text="公园").click()
    until(page, "talk.reference !== ''")
    assert chip.is_visible()
    page.click("#clear-reference")
    assert page.locator("#reference-box.chip").count() == 0


@on_each_size
def test_a_title_is_that_of_the_api_with_two_more_and_a_long_text_is_said_to_be_cut(page, server):
    page.click("[data-mode=title]")
    assert "摘要" in page.locator("#question").get_attribute("placeholder")
    assert not page.locator("#reference-box").is_visible()
    text = TEXTS[1] * 3
    page.fill("#question", text)
    page.press("#question", "Enter")
    until(page, "!writing && document.querySelectorAll('.titles li').length === 3")
    shown = page.locator(".titles .text").all_text_contents()
    body = {"task": "title", "n": 3, "messages": [{"role": "user", "content": text}]}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert shown == [choice["message"]["content"] for choice in found["choices"]]
    page.locator(".titles button").nth(1).click()
    page.wait_for_selector("button:has-text('已复制')")
    assert page.evaluate("navigator.clipboard.readText()") == shown[1]
    assert "只读了" not in page.locator("#messages").text_content()
    long = TEXTS[3] * 60
    page.fill("#question", long)
    page.press("#question", "Enter")
    until(page, "!writing && document.querySelectorAll('.titles').length === 2")
    body["messages"] = [{"role": "user", "content": long}]
    read = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["read"]
    assert 0 < read["characters"] < read["of"] == len(long)
    assert f"只读了前 {read['characters']} 字" in page.locator("#messages > li").last.text_content()
    page.click("#language")
    note = page.locator("#messages > li").last.text_content()
    assert f"only the first {read['characters']} of {len(long)} characters" in note
    # A conversation beside it is sent without what was asked for titles.
    page.click("[data-mode=chat]")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "你好", tokens=6)
    sent = json.loads(request.value.post_data)
    assert [m["content"] for m in sent["messages"]] == ["你好"] and "task" not in sent
    reload(page)
    assert page.locator(".titles").first.locator(".text").all_text_contents() == shown


def docx(paragraphs: list[str]) -> bytes:
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        document = f'<w:document xmlns:w="{space}"><w:body>{body}</w:body></w:document>'
        archive.writestr("word/document.xml", document)
    return out.getvalue()


def pdf(text: str) -> bytes:
    """One page with a line of Latin letters."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]  # fmt: skip
    out, places = b"%PDF-1.4\n", []
    for number, found in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, found)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + (
        b"xref\n0 6\n0000000000 65535 f \n%btrailer\n<< /Size 6 /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (table, len(out))
    )


def take(page, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    page.set_input_files("#document", file)


def test_documents_become_the_reference(page):
    pytest.importorskip("pypdf", reason="pip install -r requirements/serve.txt")
    for name, data, wanted in (
        ("a.txt", "第一行\r\n第二行".encode(), "第一行\n第二行"),
        ("gbk.txt", "国标编码的文字".encode("gb18030"), "国标编码的文字"),
        ("bom.md", "\ufeff# 标题".encode(), "# 标题"),
        ("windows.txt", "宽字符".encode("utf-16"), "宽字符"),
        ("a.docx", docx(["第一段", "第二段 &amp; 更多"]), "第一段\n第二段 & 更多"),
        ("a.pdf", pdf("Ginkgo trees are old"), "Ginkgo trees are old"),
    ):
        take(page, name, data)
        until(page, f"document.querySelector('#reference').value === {wanted!r}", 40)
        assert name in page.locator("#reference-state").text_content()
    before = page.locator("#reference").input_value()
    damaged = docx(["x" * 5000])
    for name, data, wanted in (
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0", "读不出文字"),
        ("a.docx", damaged[:200] + damaged[260:], "读不出文字"),
        ("a.xlsx", damaged.replace(b"word/document.xml", b"word/documentx.ml"), "读不出文字"),
        ("old.doc", b"\xd0\xcf\x11\xe0" + b"\0" * 99, "另存为 .docx"),
        ("empty.txt", b" \n", "没有文字"),
        ("bad.pdf", b"%PDF-1.4\n" + b"nonsense" * 9, "读不出这个 PDF"),
        ("scan.pdf", pdf(""), "读不出这个 PDF"),
    ):
        page.evaluate("complain('')")
        take(page, name, data)
        page.wait_for_selector("#notice:not([hidden])", timeout=40_000)
        notice = page.locator("#notice").text_content()
        assert wanted in notice and name in notice
        assert page.locator("#reference").input_value() == before
    page.click("[data-mode=title]")
    take(page, "b.txt", TEXTS[0].encode())
    until(page, f"document.querySelector('#question').value === {TEXTS[0]!r}")


def test_a_file_can_be_dropped(page):
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["拖进来的资料"], "拖.txt"));
            const drop = (kind) => document.dispatchEvent(
                new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            drop("dragover");
            window.wasShown = !document.querySelector("#drop").hidden;
            drop("drop");
        }"""
    )
    until(page, "talk.reference === '拖进来的资料'")
    assert page.evaluate("wasShown") and page.locator("#drop").is_hidden()


@on_each_size
def test_markdown_is_shown_and_nothing_in_it_runs(page):
    reply = (
        "## 标题\n\n- 一\n- **二**\n\n```python\nprint('<b>')\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "<img src=x onerror=alert(1)> <script>alert(1)</script> ![x](https://evil.example/x.png)\n"
        "[坏](javascript:alert(1)) [好](https://example.org/) [坏](data:text/html,x)"
    )
    messages = [{"role": "user", "content": "**不变**"}, {"role": "assistant", "content": reply}]
    put_talk(page, {"messages": messages})
    shown = page.locator("#messages li.assistant .text")
    assert shown.locator("h2, li, strong, pre code, td").count() == 7
    assert shown.locator("li").first.evaluate("e => getComputedStyle(e).display") == "list-item"
    assert shown.locator("img, script, iframe, style").count() == 0
    links = shown.locator("a").evaluate_all("all => all.map(e => e.getAttribute('href'))")
    assert [link for link in links if link] == ["https://example.org/"]
    assert "<img src=x onerror=alert(1)>" in shown.text_content()
    shown.locator("pre button").click()
    page.wait_for_selector("button:has-text('已复制')")
    assert page.evaluate("navigator.clipboard.readText()").strip() == "print('<b>')"
    assert page.locator("#messages li.user .text").text_content() == "**不变**"
    assert page.locator("#messages li.user .text strong").count() == 0


def test_speed_and_context_stand_below_a_reply(page):
    ask(page, "你好", tokens=40)
    note = page.locator("#messages li.assistant .note").last.text_content()
    assert "token/秒" in note and "/512" in note


@on_each_size
def test_the_end_is_a_click_away(page):
    talk = [{"role": role, "content": f"{n} " + TEXTS[0] * 3}
            for n in range(12) for role in ("user", "assistant")]  # fmt: skip
    put_talk(page, {"messages": talk})
    assert page.locator("#to-end").is_hidden()
    page.evaluate("document.querySelector('#talk').scrollTop = 0")
    page.wait_for_selector("#to-end:not([hidden])")
    page.click("#to-end")
    until(page, "fromEnd() < 10")
    until(page, "document.querySelector('#to-end').hidden")


def test_arrow_up_edits_the_last_message(page):
    page.press("#question", "ArrowUp")
    assert page.locator(".editing").count() == 0
    ask(page, "第一", tokens=6)
    ask(page, "第二", tokens=6)
    page.press("#question", "ArrowUp")
    field = page.locator(".editing textarea")
    assert field.input_value() == "第二"
    field.press("Escape")
    page.fill("#question", "写着")
    page.press("#question", "ArrowUp")
    assert page.locator(".editing").count() == 0


def test_a_system_prompt_goes_before_the_reference(page):
    page.click("#open-settings")
    page.fill("#system", "请简短回答")
    page.click("#close-settings")
    page.click("#reference-box summary")
    page.fill("#reference", "银杏是树。")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "银杏是什么？", tokens=6)
    assert json.loads(request.value.post_data)["reference"] == "请简短回答\n银杏是树。"
    assert "系统提示" in page.locator("#system-chip").text_content()
    fresh(page)
    assert page.locator("#system-chip").is_hidden()
    assert page.locator("#system").input_value() == ""


@on_each_size
def test_the_card_of_the_model_is_shown(page):
    page.click("#open-card")
    page.wait_for_selector("#card[open]")
    facts = page.locator("#facts").text_content()
    assert "512" in facts and "写标题" in facts and "420" in facts
    assert page.locator("#card-text em").text_content() == "写标题"
    assert "<script>" in page.locator("#card-text").text_content()
    page.click("#close-card")
    assert page.locator("#card[open]").count() == 0


def test_all_conversations_are_exported_with_model_and_date(page):
    ask(page, "第一", tokens=6)
    fresh(page)
    ask(page, "第二", tokens=6)
    page.click("#open-settings")

    def exported(kind: str) -> str:
        with page.expect_download() as download:
            page.click(f"[data-export=all] button:text-is('{kind}')")
        with open(download.value.path(), encoding="utf-8") as file:
            return file.read()

    found = json.loads(exported(".json"))
    year = page.evaluate("new Date().getUTCFullYear()")
    assert found["model"] == "small" and found["exported"].startswith(str(year))
    assert [t["messages"][0]["content"] for t in found["conversations"]] == ["第一", "第二"]
    assert all(t["created"].startswith(str(year)) for t in found["conversations"])
    text = exported(".md")
    assert text.count("small") == 2 and str(year) in text and "第一" in text and "第二" in text
    rows = [json.loads(line) for line in exported(".jsonl").splitlines()]
    assert [row["id"] for row in rows] == ["page/1", "page/2"]
    assert all(set(row) == {"id", "messages"} for row in rows)


def test_faults_are_told_in_the_language_of_the_page(page):
    for wanted in ("太长", "Too long"):
        page.fill("#question", "Llanfair" * 700)
        page.press("#question", "Enter")
        page.wait_for_selector("#notice:not([hidden])")
        until(page, "!writing")
        assert wanted in page.locator("#notice").text_content()
        fresh(page)
        page.click("#language")


def test_what_a_model_was_trained_for_is_what_the_page_offers(browser, tokenizer, tmp_path):
    model = talkative_model(tokenizer, 256)
    for tasks, modes, has_reference in (
        (["title", "chat"], ["写标题", "聊天"], False), (["chat", "reference"], [], True),
        (["continue"], [], False),
    ):  # fmt: skip
        model.more_info = {"tasks": tasks}
        run = save(model, tokenizer, tmp_path / "-".join(tasks))
        with serving(run, tmp_path / "log") as server, visitor(browser, server.url) as page:
            choice = page.locator("#modes")
            shown = choice.locator("button").all_text_contents() if choice.is_visible() else []
            assert shown == modes
            assert page.locator("#reference-box").is_visible() == has_reference
            assert ("资料" in page.locator("#welcome").text_content()) == has_reference
            assert page.evaluate("mode()") == tasks[0]
            if tasks == ["continue"]:
                with page.expect_request("**/v1/completions") as request:
                    reply = ask(page, "从前", tokens=6)
                assert json.loads(request.value.post_data)["prompt"] == "从前" and reply
