"""Readers of documents: what becomes of each row of the fixtures, and why."""

import bz2
import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain

import pytest
from reading import (
    FIXTURES,
    SHARED,
    check_wrong_types,
    fault,
    finished,
    raw,
    read,
    reason,
    set_of,
)

from data_process.datasets import mnbvc, wiki
from data_process.raw import Record, Skip

TEAPOT = """茶壶 & 茶杯
茶壶（teapot）是泡茶的器皿，由陆子和Pot设计，\xa0用软件绘制。
历史
起源
始于宋代，见官网与。
容积是$V_{a_{b}} < {{1}}$。
* 第一项
* 第二项
写作[[茶]]。未闭合的模板
用途
结尾。"""
LAW = "某某法\n2020年1月1日 通过\n第一章\u3000总则\n第一条 为了保护权益，制定本法。\n"
LAW += "第二条 见本法说明。"
BOOK = """图论
例题
    概率 与 `a**b**c`，$f^{**}(x) = v^*_i, v^*_j$。
如上文与上式所示。
关键的
一句
- 甲
- 乙"""
FOG = """为什么冬天玻璃上会起雾？
每天早上窗户都是湿的。
室内的水汽遇到冷玻璃，
凝成了小水珠。"""

# What comes of every record: (id, text), or a Skip's reason, with "!" if the line is damaged.
EXPECTED = {
    "mnbvc.jsonl": [
        (0, "本市新增两条公交线路。\n线路下周一开始试运行。"),
        "flagged_duplicate",
        "flagged_suspect",
        (
            3,
            "为什么冬天玻璃上会起雾？\n每天早上窗户都是湿的。\n室内的水汽遇到冷玻璃，\n凝成了小水珠。",
        ),
        (4, "怎样煮面？\n水开后下面。"),
        "no_answer",
        (6, "写一个超短小说。\n他们相遇，又别离。\n那结尾呢？\n他们又见面了。"),
        (8, "你好\n你好，有什么事？"),
        (9, "同一个会话号，又从头数起\n那就是另一次会话。"),
        (10, "今天的晚霞真好看。\n我也拍了一张。"),
        (11, "食堂哪个窗口好吃？\n二楼的面。\n一楼的饺子。"),
        (12, "原告请求返还借款。\n本院予以支持。"),
        (13, "[{注}] 公司全年营业收入增长。"),
        (14, "会议将于今日举行。"),
        "code",
        "unknown_schema!",
        "broken_json!",
    ],
    "wiki.list.json": [
        (0, "银杏，是银杏科的落叶乔木。\n分布\n* 原产于中国，现在广泛栽培。"),
        "wrong_type!",
        "empty_text",
    ],
    "wiki.wiki_00": [
        (0, "經濟學\n經濟學是研究資源如何分配的社會科學。\n它與數學有密切聯繫。"),
        (1, "数学\n数学是利用符号语言研究数量的学科。"),
    ],
    "wiki.blocks.txt": [
        (0, '"红楼" A<B\n这是第一段。\n<doc 不是新的一块'),
        "outside_page!",
        "empty_text",
        "cut_page!",
    ],
    "wiki.dump.xml": [
        (8, TEAPOT),
        "not_an_article",
        "redirect",
        "disambiguation",
        "empty_text",
        "wrong_page!",
        "cut_page!",
    ],
    "baike563w.jsonl": [
        (0, "红豆糕：红豆糕是一种传统点心。\n做法：红豆泡软后蒸熟。\n再切成 小块。"),
        (1, "石桥\n一座桥。\n结构：单孔。"),
        (2, "青藤：一种植物。"),
        "no_body",
        "no_body",
    ],
    "text.jsonl": [
        (0, "普通的一篇文章。\n有两行。"),
        (1, "悟道\n有标题的文章。"),
        (2, "风波\n临河的土场上。"),
        (3, "第一篇。\n第二篇。\n第三篇"),
        (4, "导语\n正文里有 <b>标记</b>。"),
        "empty_text",
        (6, "不是文字"),
        (7, "没有认得的键"),
    ],
    "lines.txt": [
        (0, "第一篇文章，占一行。"),
        (1, '{"text": "看起来像 JSON，也是一行。"}'),
        (2, "最后一篇。"),
    ],
    "law.jsonl": [(0, LAW), (1, BOOK), "empty_text", "wrong_type!"],
    "news.json": [
        (0, "两条公交线路试运行\n本市新增两条线路。\n下周一开始。"),
        (1, "图书馆 延长开放\n图书馆本周起开放到晚上十点。"),
        "no_summary",
        "no_text",
        "no_text",
    ],
}

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


@pytest.mark.parametrize("place", EXPECTED)
def test_every_record_becomes_the_expected_rows_and_skips(place):
    data_set = set_of(place.split(".")[0])
    items = read(data_set, raw(FIXTURES / place, data_set))
    told = [reason(i) or (i["id"], finished(data_set, i)["text"]) for i in items]
    assert told == EXPECTED[place]
    assert all(fault(data_set, i) is None for i in items if not reason(i))


@pytest.mark.parametrize("place", EXPECTED)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(place):
    check_wrong_types(set_of(place.split(".")[0]), FIXTURES / place, fixed=False)


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
