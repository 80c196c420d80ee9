"""Readers of documents: what becomes of each row of the fixtures, and why."""

import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain

import pytest
from reading import SHARED, fault, finished, raw, read, reason, set_of

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


def test_a_page_without_end_is_read_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(wiki, "LONGEST_PAGE", 1000)
    last = []

    def dump() -> Iterator[Record]:
        long = (f"第{n}行" + "字" * 1000 for n in range(2000))  # 4 MB
        for place, text in enumerate(
            chain(['<doc id="1">'], long, ["</doc>", '<doc id="2">', "断"])
        ):
            last[:] = [place]
            yield Record(place, f"a.xml:{place}", None, text)

    tracemalloc.start()
    stream = wiki.wiki(dump())
    assert reason(next(stream)) == "page_too_long"
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()
    assert last == [2001], "a page comes out as soon as it ends"
    assert [reason(item) for item in stream] == ["cut_page!"]


def test_readers_of_blocks_and_conversations_take_files_in_one_piece():
    assert not set_of("wiki").split_files and not set_of("mnbvc").split_files
