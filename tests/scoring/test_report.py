"""The report page: escaped, self-contained, and coloured where it should be."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from babyllama.scoring.report import Compared, coloured, page, visible, write_report
from babyllama.scoring.rouge import rouge_published
from babyllama.scoring.tables import System
from browsing import needs_browser

ROWS = [
    Compared(
        "a/1", "<script>alert(1)</script>", "图像去噪", ("图像去噪法", "图像识别"), (90.0, 50.0)
    ),
    Compared("a/2", "正文", '"><img src=x onerror=alert(1)>', ("", "一样"), (0.0, 0.0)),
    Compared("a/3", "正文", "题", ("甲", "题"), (10.0, 100.0)),
]
PAGE = page(("甲 <b>", "乙"), "ROUGE-1", ROWS, ["一行 <i>"])


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    VOID = ("meta", "input")

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def test_what_a_model_wrote_stays_text():
    tags = parsed(PAGE)
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert not any(tag in ("img", "iframe", "link", "b ") for tag, _ in tags.found)
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    shown = "".join(tags.texts)
    assert "<script>alert(1)</script>" in shown and "onerror=alert(1)" in shown


def test_nothing_is_asked_from_outside():
    tags = parsed(PAGE)
    assert not any(key in ("src", "href") for _, attributes in tags.found for key in attributes)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", PAGE)
    (policy,) = [a["content"] for t, a in tags.found if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_every_row_can_be_sorted_by_its_scores():
    rows = [a for tag, a in parsed(PAGE).found if tag == "tr" and "data-n" in a]
    found = [(float(r["data-a"]), float(r["data-b"]), float(r["data-gain"])) for r in rows]
    assert found == [(90, 50, 40), (0, 0, 0), (10, 100, -90)]
    keys = [a["data-key"] for tag, a in parsed(PAGE).found if tag == "button"]
    assert keys == ["n", "ref", "a", "b", "gain"]
    assert all(f"data-{key}" in rows[0] for key in keys)


def test_what_only_one_has_is_coloured_and_what_the_reference_has_is_underlined():
    found = coloured("图像去噪法", "图像识别", "图像去噪")
    assert found == (
        '<span class="hit">图像</span><span class="only hit">去噪</span>'
        '<span class="only">法</span>'
    )
    assert coloured("同", "同", "异") == "同"
    assert "empty" in coloured("", "甲", "乙")


@pytest.mark.parametrize("bad", ["\x00", "\x1b[31m", "\u202e", "\ud7ff\ufffe", "\u200b"])
def test_what_cannot_be_seen_is_shown(bad):
    assert "\ufffd" in visible(f"甲{bad}乙") and bad not in visible(f"甲{bad}乙")


def written(path: Path, rows: Sequence[Compared], names: tuple[str, str], note: str) -> Path:
    """The page on two systems with these titles."""
    texts, references = [row.text for row in rows], [row.reference for row in rows]
    systems = [System(name, [row.titles[i] for row in rows]) for i, name in enumerate(names)]
    for system in systems:
        system.score(texts, references)
    found = [{"id": row.row_id, "text": row.text, "summary": row.reference} for row in rows]
    write_report(path, found, systems, note)
    return path


def test_means_and_counts_stand_above(tmp_path):
    text = written(tmp_path / "new/r.html", ROWS, ("甲", "乙"), "注").read_text("utf-8")
    cards = re.findall(r"<span>([\d.]+)</span><small>(\d*)", text)
    scores = [rouge_published([r.titles[i] for r in ROWS], [r.reference for r in ROWS]).f["rouge-1"]
              for i in (0, 1)]  # fmt: skip
    better = [int((a > b + 1e-9).sum()) for a, b in (scores, scores[::-1])]
    wanted = [(f"{100 * s.mean():.1f}", str(n)) for s, n in zip(scores, better, strict=True)]
    assert cards == [*wanted, (str(len(ROWS) - sum(better)), "")] and "<pre>注</pre>" in text


def test_no_rows_are_a_page_too():
    assert "<tbody>" in page(("甲", "乙"), "ROUGE-1", [], [])


def test_bars_are_as_long_as_their_scores_and_equal_rows_show_no_sign():
    assert re.findall(r"--share:(\d+)%", PAGE) == ["90", "50", "0", "0", "10", "100"]
    assert re.findall(r'<td class="n gain \w*">(.*?)</td>', PAGE) == ["+40.0", "=", "\u221290.0"]


# As a reader meets it.


@pytest.fixture(params=[390, 1280])
def opened(request, browser, tmp_path):
    """The page as wide as a phone and as a desk's screen."""
    long = Compared("a/4", "文" * 400, "考" * 40, ("长题" * 30, "x" * 90), (20.0, 15.0))
    written(tmp_path / "r.html", [*ROWS, long], ("甲" * 20, "b" * 40), "长" * 200)
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append("a dialog opened"), dialog.dismiss()))
    page.goto((tmp_path / "r.html").as_uri())
    yield page
    assert not faults
    page.close()


def shown_rows(page) -> list[str]:
    rows = page.locator("tbody tr").all()
    return [row.get_attribute("data-n") for row in rows if row.is_visible()]


@needs_browser
def test_titles_have_room_on_a_phone_and_stand_beside_each_other_on_a_desk(opened):
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    reference, a, b = (
        opened.locator(f"td.{side}").last.bounding_box() for side in ("ref", "a", "b")
    )
    if width < 700:
        assert a["width"] > 0.85 * width and b["width"] > 0.85 * width
        assert reference["y"] < a["y"] < a["y"] + a["height"] <= b["y"]
    else:
        assert a["y"] == b["y"] == reference["y"] and a["x"] + a["width"] <= b["x"]


@needs_browser
def test_rows_are_sorted_and_searched_in_the_page(opened):
    assert shown_rows(opened) == ["1", "2", "3", "4"]
    head = opened.get_by_role("button", name="A − B")
    head.click()
    assert shown_rows(opened) == ["1", "2", "4", "3"]
    head.click()
    assert shown_rows(opened) == ["3", "2", "4", "1"]
    opened.fill("input[type=search]", "图像")
    assert shown_rows(opened) == ["1"] and opened.inner_text("output") == "1"
    opened.fill("input[type=search]", "没有这个")
    assert shown_rows(opened) == []
