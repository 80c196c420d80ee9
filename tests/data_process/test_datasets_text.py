"""Readers of documents: what becomes of each row of the fixtures, and why."""

import bz2
import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain

import pytest
from reading import FIXTURES, SHARED, fault, finished, raw, read, reason, set_of

from data_process.datasets import mnbvc, wiki
from data_process.raw import Record, Skip

# The real files: rows and characters of their texts.
REAL = {
    ("mnbvc", "mnbvc_format"): (70, 701_000),
    ("wiki", "wikipedia_zh"): (5394, 3_200_000),
    ("lines", "clue_corpus_small"): (2500, 676_000),
    ("lines", "news_zh/peoples_daily_199801.txt.xz"): (19_484, 1_840_000),
    ("law", "law_zh"): (519, 2_780_000),
    ("law", "oi_wiki"): (404, 2_080_000),
    ("law", "d2l_zh"): (134, 490_000),
    ("text", "luxun"): (307, 740_000),
    ("news", "news_zh/inews_dev.jsonl.xz"): (689, 753_000),
}


def lines(*texts: str) -> list[Record]:
    return [Record(n, f"a.txt:{n + 1}", None, text) for n, text in enumerate(texts)]


def page(wikitext: str) -> str:
    """The text of a dump's page named 题, without its title."""
    xml = f"<page>\n<title>题</title>\n<ns>0</ns>\n<text>{wikitext}</text>\n</page>"
    (row,) = wiki.wiki(lines(*filter(None, xml.split("\n"))))
    return row["text"].removeprefix("题\n")


# Every reader.


@pytest.mark.parametrize(("name", "place"), REAL)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_files_give_only_rows(name, place):
    data_set = set_of(name)
    items = read(data_set, raw(SHARED / place, data_set))
    assert {reason(item) or fault(data_set, item) for item in items} == {None}
    n_chars = sum(len(finished(data_set, item)["text"]) for item in items)
    n_rows, wanted = REAL[name, place]
    assert len({item["id"] for item in items}) == len(items) == n_rows
    assert n_chars == pytest.approx(wanted, rel=0.02)


# MNBVC.


def turn(name: str, number: int, place: int = 0, file: str = "0.jsonl") -> Record:
    about = {"扩展字段": f'{{"会话": {name}, "多轮序号": {number}}}'}
    row = {"问": f"问{number}", "答": f"答{number}", "元数据": about}
    return Record(place, f"{file}:{place}", None, row)


def test_turns_of_a_conversation_are_sorted_whatever_their_order():
    wanted = "\n".join(f"问{n}\n答{n}" for n in range(1, 13))
    order = list(range(1, 13))
    random.Random(0).shuffle(order)
    (row,) = mnbvc.mnbvc([turn("7", number, place) for place, number in enumerate(order)])
    assert row == {"id": 0, "text": wanted}


@pytest.mark.parametrize(
    ("detail", "kept"),
    [
        ("窗户都是湿的。", True),
        ('"from": "human"', False),
        ("{}", False),
        ("问", False),
        (None, False),
    ],
)
def test_only_details_that_tell_more_stand_below_the_question(detail, kept):
    data = {"问": "问", "答": "答", "元数据": {"问题明细": detail}}
    (row,) = mnbvc.mnbvc([Record(0, "0.jsonl:1", None, data)])
    assert row["text"] == "\n".join(["问", *([detail] if kept else []), "答"])


def test_conversations_of_different_files_are_never_joined():
    entries = [turn("1", 1, file="0.jsonl"), turn("1", 2, file="1.jsonl")]
    assert [row["text"] for row in mnbvc.mnbvc(entries)] == ["问1\n答1", "问2\n答2"]


def test_a_line_between_two_conversations_comes_out_in_its_place():
    damage = Skip("broken_json", "0.jsonl:2", "{")
    out = list(mnbvc.mnbvc([turn("1", 1), damage, turn("1", 2)]))
    assert [reason(item) for item in out] == [None, "broken_json!", None]


def test_a_conversation_without_end_is_read_in_bounded_memory():
    long = (turn("1", number, number) for number in range(2 * mnbvc.MOST_TURNS + 5))
    texts = [row["text"] for row in mnbvc.mnbvc(long)]
    assert [text.count("问") for text in texts] == [mnbvc.MOST_TURNS] * 2 + [5]
    assert texts[1].startswith(f"问{mnbvc.MOST_TURNS}\n")


# Wikipedia.


def test_a_packed_dump_gives_the_rows_of_the_plain_one(tmp_path):
    plain = FIXTURES / "wiki.dump.xml"
    (tmp_path / "dump.xml.bz2").write_bytes(bz2.compress(plain.read_bytes()))
    places = (plain, tmp_path / "dump.xml.bz2")
    rows = [list(wiki.wiki(raw(path, set_of("wiki")))) for path in places]
    assert [reason(item) or item for item in rows[0]] == [reason(item) or item for item in rows[1]]


def test_a_page_without_end_is_read_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(wiki, "LONGEST_PAGE", 1000)
    last = []

    def dump() -> Iterator[Record]:
        long = (f"第{n}行" + "字" * 1000 for n in range(2000))  # 4 MB
        for place, text in enumerate(chain(["<page>"], long, ["</page>", "<page>", "断"])):
            last[:] = [place]
            yield Record(place, f"a.xml:{place}", None, text)

    tracemalloc.start()
    stream = wiki.wiki(dump())
    assert reason(next(stream)) == "page_too_long"
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()
    assert last == [2001], "a page comes out as soon as it ends"
    assert [reason(item) for item in stream] == ["cut_page!"]


@pytest.mark.parametrize(
    ("wikitext", "wanted"),
    [
        ("'''甲'''与''乙''", "甲与乙"),
        ("[[甲|乙]]、[[:分类:丙]][[Category:丁]][[檔案:x.jpg|thumb|[[戊]]]]己", "乙、分类:丙己"),
        ("{{le|甲|A}}{{link-en|乙|B|丙}}{{tsl|de|D||}}{{nowrap|1=丁}}{{x|{{y}}|戊}}", "甲丙D丁"),
        ("-{zh-cn:软件; zh-tw:軟體}-、-{A|zh-hant:體; zh-hans:体;}-、-{原樣}-", "软件、体、原樣"),
        ("-{H|zh-cn:甲;zh-tw:乙}-丙-{T|丁}--{zh-tw:戊}-", "丙戊"),
        ("甲-{{lang|en|B}}-丙，-{{{lang|en|三}}}-", "甲-B-丙，三"),
        ("甲&lt;ref name=a&gt;{{乙]]&lt;/ref&gt;丙&lt;ref name=a/&gt;丁", "甲丙丁"),
        ("甲&lt;!-- {{ --&gt;乙&lt;br/&gt;丙&lt;b&gt;丁&lt;/b&gt;&amp;lt;", "甲乙\n丙丁<"),
        ("&lt;math&gt;\\frac{{a}}{b}&lt;/math&gt;，&lt;nowiki&gt;'''[[甲]]&lt;/nowiki&gt;",
         "$\\frac{{a}}{b}$，'''[[甲]]"),
        ("甲（{{未知}}，乙，{{未知}}）（，）", "甲（乙）"),
        ("{|\n! 头\n|-\n| 甲\n{|\n| 内\n|}\n|}\n乙", "乙"),
        ("甲\n{|\n! 头\n|-\n| 没有闭合", "甲"),
        ("甲\n== 空 ==\n== 外 ==\n=== 内 ===\n乙\n== 參考資料 ==\n丙\n=== 丁 ===\n戊\n== 己 ==\n庚",
         "甲\n外\n内\n乙\n己\n庚"),
        ("*甲\n##乙\n:丙\n;丁\n**\n__NOTOC__", "* 甲\n* 乙\n丙\n丁"),
        (":在12:30开始，比分3:2\n* C#语言", "在12:30开始，比分3:2\n* C#语言"),
        ("[https://a.cn/x 甲]乙[//b.cn]", "甲乙"),
        ("甲{{乙|[[丙}}丁，甲[[乙{{丙]]丁，{{戊]]己}}庚", "甲丁，甲乙丙丁，庚"),
        ("]]甲{{乙]]丙", "甲乙丙"),
    ],
)  # fmt: skip
def test_wikitext_becomes_what_a_reader_sees(wikitext, wanted):
    assert page(wikitext) == wanted


@pytest.mark.parametrize("marks", [("{{", "[[", "{|\n"), ("}}", "]]", "\n|}")])
def test_a_mark_without_its_partner_swallows_no_text(marks):
    chance = random.Random(3)
    for _ in range(50):
        words = [f"第{n}词。" for n in range(20)]
        text = "甲" + "\n".join(word + chance.choice(marks) for word in words).replace("\n\n", "\n")
        assert all(word in page(text) for word in words), text


@pytest.mark.parametrize("first", ["#重定向 [[甲]]", "{{消歧义|人名}}", "'''甲'''\n{{Disambig}}"])
def test_what_is_no_article_is_counted_and_left_out(first):
    xml = f"<page>\n<title>题</title>\n<ns>0</ns>\n<text>{first}</text>\n</page>"
    (skip,) = wiki.wiki(lines(*xml.split("\n")))
    assert reason(skip) in ("redirect", "disambiguation")


def test_readers_of_blocks_and_conversations_take_files_in_one_piece():
    assert not set_of("wiki").split_files and not set_of("mnbvc").split_files
