"""Reference text: against a local server that answers as api.php of a MediaWiki does."""

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.retrieval.index import build, excerpt, trim
from babyllama.retrieval.retriever import (
    Article,
    Choices,
    Context,
    Retriever,
    WikiError,
    look_up,
)
from test_index import write_articles

PAGES = {
    "银杏": "银杏，是银杏科的落叶乔木。\n\n原产于中国，现在广泛栽培。\n",
    "苹果公司": "苹果公司是一家美国公司。",
    "无序言": "",
}
REDIRECTS = {"白果树": "银杏", "银杏树": "银杏"}
CONVERTED = {"銀杏": "银杏", "銀杏樹": "银杏树"}
AMBIGUOUS = {
    "苹果": "<ul><li class='tocsection-1'><a>目录</a></li><li><a>苹果公司</a>，企业</li>"
    "<li>无链接</li><li><a>苹果公司</a></li><li><a>苹果 (水果)</a></li></ul>"
}
BROKEN = {"坏": (500, "<html>Internal error</html>"), "错": (200, '{"error": {"info": "x"}}')}
BROKEN |= {"列表": (200, "[]"), "半": (200, '{"query": {"pages": ')}


def answer(asked: dict[str, str]) -> dict:
    """What api.php says; shapes as zh.wikipedia.org sends them with formatversion 1."""
    if asked.get("list") == "search":
        wanted = asked["srsearch"]
        hits = [title for title in PAGES if wanted != "虚无" and set(wanted) & set(title)]
        hits = [{"ns": 0, "title": title} for title in hits]
        return {"batchcomplete": "", "query": {"searchinfo": {"totalhits": 9}, "search": hits}}
    title, query = asked["titles"], {}
    if "converttitles" in asked and title in CONVERTED:
        query["converted"] = [{"from": title, "to": CONVERTED[title]}]
        title = CONVERTED[title]
    if title in REDIRECTS:
        query["redirects"] = [{"from": title, "to": REDIRECTS[title]}]
        title = REDIRECTS[title]
    if title not in PAGES and title not in AMBIGUOUS:
        return {"query": query | {"pages": {"-1": {"ns": 0, "title": title, "missing": ""}}}}
    page = {"pageid": 7, "ns": 0, "title": title, "fullurl": f"https://wiki/{title}"}
    if asked["prop"].startswith("info") and title in AMBIGUOUS:
        page["pageprops"] = {"disambiguation": ""}
    if "revisions" in asked["prop"]:
        page["revisions"] = [{"revid": 2, "parentid": 1, "*": AMBIGUOUS.get(title, "")}]
    if "extracts" in asked["prop"]:
        text = PAGES[title] if "exintro" in asked else "\n\n\n== 分布 ==\n在中国。"
        page["extract"] = text.replace(
            "现在", "現在" if asked.get("variant") != "zh-cn" else "现在"
        )
    return {"batchcomplete": "", "query": query | {"pages": {"7": page}}}


class Wiki(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        self.server.agents.add(self.headers["User-Agent"])
        wanted = asked.get("titles") or asked.get("srsearch")
        if wanted == "挂起":
            self.server.closing.wait(20)
            return
        code, text = BROKEN.get(wanted) or (200, json.dumps(answer(asked)))
        self.send_response(code)
        self.end_headers()
        if wanted == "滴水":
            self.drip()
        self.wfile.write(text.encode())

    def drip(self) -> None:
        """One byte now and then, which no time limit of a socket notices."""
        while not self.server.closing.wait(0.1):
            self.wfile.write(b" ")
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wiki)
    server.agents, server.closing = set(), Event()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/w/api.php"


def test_a_page_comes_in_simplified_characters_without_empty_lines(url):
    text = "银杏，是银杏科的落叶乔木。\n原产于中国，现在广泛栽培。"
    assert look_up("银杏", url) == Article("银杏", text, "https://wiki/银杏")


def test_a_redirect_leads_to_its_target(url):
    assert look_up(" 白果树 ", url) == look_up("银杏", url)


def test_a_title_in_traditional_characters_is_found(url):
    assert look_up("銀杏", url) == look_up("银杏", url)
    # The package cannot follow a redirect after a conversion: the user is asked.
    assert look_up("銀杏樹", url) == Choices("銀杏樹", ["银杏"], ambiguous=False)


def test_a_page_without_introduction_gives_its_sections(url):
    assert look_up("无序言", url).text == "分布\n在中国。"


def test_a_word_with_several_meanings_asks_back(url):
    assert look_up("苹果", url) == Choices("苹果", ["苹果公司", "苹果 (水果)"], ambiguous=True)


def test_a_missing_page_offers_the_nearest_titles(url):
    assert look_up("苹果派", url) == Choices("苹果派", ["苹果公司"], ambiguous=False)


def test_nothing_near_is_said_so(url):
    with pytest.raises(WikiError, match="没有“虚无”"):
        look_up("虚无", url)


@pytest.mark.parametrize("word", BROKEN)
def test_a_broken_answer_is_one_clear_message(url, word):
    with pytest.raises(WikiError, match=r"不是 JSON|不像 MediaWiki"):
        look_up(word, url)


@pytest.mark.parametrize("word", ["挂起", "滴水"])
def test_the_time_limit_holds_for_silence_and_for_dripping(url, word):
    start = time.perf_counter()
    with pytest.raises(WikiError, match=r"0\.5 秒内没有答复"):
        look_up(word, url, timeout_s=0.5)
    assert time.perf_counter() - start < 2
    assert isinstance(look_up("银杏", url), Article)  # and the next look-up works


def test_no_network_is_one_clear_message():
    with socket.socket() as closed, pytest.raises(WikiError, match=r"无法连接.*/资料"):
        closed.bind(("127.0.0.1", 0))  # and does not listen
        look_up("银杏", f"http://127.0.0.1:{closed.getsockname()[1]}/w/api.php")


@pytest.mark.parametrize("word", ["", "  ", "a|b", "一[二]", "长" * 86, "a\x00b"])
def test_what_cannot_be_a_title_is_not_sent(word):
    with pytest.raises(WikiError, match="不能作词条名"):
        look_up(word, "http://127.0.0.1/w/api.php")


def test_requests_carry_our_own_name(url, server):
    server.agents.clear()
    look_up("苹果派", url)
    assert len(server.agents) == 1 and server.agents.pop().startswith("babyllama/")


TEXT = "一二三。“四五！”六七？\n八九十。"


@pytest.mark.parametrize(
    "limit, wanted",
    [
        (99, TEXT),
        (len(TEXT), TEXT),
        (len(TEXT) - 1, "一二三。“四五！”六七？"),
        (11, "一二三。“四五！”"),
        (7, "一二三。"),
        (3, "一二三"),  # not even one sentence
        (0, ""),
    ],
)
def test_trim_keeps_whole_sentences(limit, wanted):
    assert trim(TEXT, limit) == wanted


def test_trim_counts_with_the_given_measure():
    assert trim(TEXT, 30, size=lambda text: len(text.encode())) == "一二三。“四五！”"
    assert trim("Dr. No costs 3.50. Yes.", 19) == "Dr. No costs 3.50."


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    place = tmp_path_factory.mktemp("index")
    build([write_articles(place / "rows.jsonl")], place / "wiki", "wiki", longest=25)
    return Retriever(place / "wiki")


@pytest.mark.parametrize("budget", range(0, 80, 3))
def test_a_context_fits_its_budget_and_holds_what_it_cites(retriever, budget):
    found = retriever.context("银杏的叶子秋天变黄", budget, lambda text: 2 * len(text))
    assert 2 * len(found.text) <= budget
    assert bool(found.text) == bool(found.passages)
    for passage in found.passages:
        assert passage.text in found.text and passage.citation in found.citation


def test_a_context_is_made_of_what_is_about_the_question_alone(retriever):
    found = retriever.context("银杏的叶子什么时候变黄？", 300)
    assert "秋天变黄" in found.text and {p.title for p in found.passages} == {"银杏"}
    assert retriever.context("量子纠缠是什么？", 300) == Context()


def test_an_article_is_its_beginning_or_what_a_search_brings(retriever):
    assert retriever.article("镍", 300).text.startswith("镍是一种有铁磁性的金属元素。")
    assert retriever.article("有铁磁性的金属", 300).passages[0].title == "镍"
    assert retriever.article("量子纠缠", 300) == Context()


def test_of_a_text_that_is_too_long_the_sentences_stay_that_answer():
    text = "开头的话说了很多。中间也说了一些。银杏的叶子在秋天变黄。最后还有一句。"
    assert "银杏的叶子在秋天变黄。" in excerpt(text, "银杏的叶子什么时候变黄？", 20)
    assert excerpt(text, "银杏的叶子", 100) == text and excerpt(text, "银杏", -3) == ""
    # Two places are kept in their order, a neighbour before a sentence of another subject.
    text += "它是落叶乔木。" + "别的话也有很多。" * 3000 + "银杏的果实叫白果。"
    found = excerpt(text, "银杏的果实和叶子", 30)
    assert found == "银杏的叶子在秋天变黄。最后还有一句。银杏的果实叫白果。"
    assert excerpt(text, "今夕是何年", 20) == trim(text, 20)


@given(st.text("银杏叶。\nab", max_size=60), st.text("银杏叶ab", max_size=8), st.integers(0, 40))
def test_an_excerpt_is_made_of_the_text_and_fits(text, question, limit):
    found = excerpt(text, question, limit)
    rest = iter(text)
    assert len(found) <= limit and all(character in rest for character in found)


def test_a_passage_that_does_not_name_its_title_is_given_it(retriever):
    found = retriever.context("果实属于蔷薇科", 300)
    assert found.text.startswith("苹果 (水果)：苹果是蔷薇科的果实。")
