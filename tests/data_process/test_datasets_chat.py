"""Readers of dialogues and instructions: what becomes of each row of the fixtures, and why."""

import copy
import importlib
from pathlib import Path

import pytest

from babyllama.rows import check_row
from data_process.clean import fix
from data_process.raw import Record, Skip, records
from data_process.registry import Source

FIXTURES = Path(__file__).parents[1] / "fixtures/data_process"
GINKGO = "S:银杏是一种古老的树种，秋天叶子变黄，果实称为白果。"

# What comes of every record: (id, turns), or a Skip's reason, with "!" if the line is damaged.
EXPECTED = {
    "redgpt.json": [
        (0, GINKGO, "U:银杏的果实叫什么？", "A:叫白果。", "U:叶子什么时候变黄？",
         "A:秋天。\n它们落得很快。"),
        "bad_turns",
        (2, GINKGO, "U:果实能吃吗？", "A:煮熟后可以少吃一些，所谓 Human: 也只是一个词。",
         "U:多吃呢？"),
        "no_reference",
        "text_before_label",
        "wrong_keys!",
    ],
    "naturalconv": [
        (4, "test", "U:新车站开了。", "A:离我家很近。"),
        (3, "val", "U:在吗？", "A:在，什么事？", "U:没事了。"),
        (2, "train", "U:你好。", "A:你好，看球赛了吗？", "U:看了，最后一分钟才进球。",
         "A:真紧张。"),
        (5, "U:这一段不在名单里。", "A:那就没有官方划分。"),
        "wrong_keys!",
        "address_only",
    ],
    "kdconv_dev.json": [
        (0, "val", "U:你去过长城吗？", "A:去过，它有两万多公里长。", "U:真长。"),
        "no_answer",
        "wrong_type!",
        "wrong_keys!",
    ],
    "pclue.json": [
        (0, "U:这条新闻是关于什么主题的？新闻：新增两条公交线路。选项：体育，交通", "A:交通"),
        (1, "U:文章里有哪些城市？", "A:北京，上海"),
        (2, "U:用自己的话写一句问候。", "A:早上好，今天过得怎么样？"),
        "target_not_a_choice",
        "cut_out_mark",
        "cut_out_mark",
        "no_target",
        "wrong_keys!",
    ],
    "belle.json": [
        (0, "U:给出两条早睡的建议。", "A:1. 固定时间。\n2. 睡前不看手机。"),
        (1, "U:把下面的话写得礼貌些：关门。", "A:麻烦您关一下门。"),
        (2, "U:一加一？", "A:二。"),
        (3, "U:写出同义词\n高兴", "A:愉快"),
        ("3-1", "U:写出同义词\n美丽", "A:漂亮"),
        "wrong_type!",
        "evaluation_set",
        "wrong_keys!",
    ],
    "belle_multiturn.json": [
        (0, "U:推荐一种水果。", "A:苹果，\n清脆可口。", "U:它有什么营养？", "A:维生素C。"),
        (1, "U:“Human:”是什么意思？", "A:是英语的“人类:”。"),
        (2, "U:只有问题，没有标签。", "A:那就直接回答。"),
        "no_open_turn",
        "bad_turns",
        "text_before_label",
        "role_label_inside",
        "unexpected_input",
        "wrong_keys!",
    ],
    "deepctrl.jsonl": [
        (0, "U:长颈鹿吃什么？", "A:主要吃树叶。", "U:那它多高？", "A:可达五米。"),
        (1, "U:写一句问候。", "A:早上好！"),
        (2, "U:你是谁？", "A:我是MOSS，由复旦大学开发。"),
        "wrong_type!",
        "broken_json!",
    ],
    "alpaca.json": [
        (0, "U:把下面的句子改得更礼貌。\n把门关上。", "A:麻烦您把门关一下。"),
        (1, "U:写一句问候。", "A:早上好！"),
        (2, "U:说说春天。", "A:春天来了。"),
        (3, "U:这个词是什么意思？\n输入法", "A:打字用的软件。"),
        "placeholder",
        "wrong_type!",
    ],
    "instruction.jsonl": [
        (0, "U:草莓甜吗？", "A:熟了就甜。"),
        (1, "S:你是一个有用的助手。", "U:问", "A:答", "U:再说一遍", "A:你好。"),
        (2, "U:今天几号？", "A:一号。"),
        "wrong_keys!",
    ],
    "sharegpt.jsonl": [
        (0, "U:推荐一种水果。", "A:苹果。", "U:谢谢"),
        (1, "S:你是一个有用的助手。", "U:一加一？", "A:<think>很容易</think>\n二。"),
        "tools",
        "bad_turns",
        "no_answer",
    ],
    "conversations.jsonl": [
        (0, "U:早", "A:早上好。"),
        (1, "U:晚饭吃什么？", "A:番茄炒蛋。", "U:然后呢？", "A:散步。"),
        "tools",
        "tools",
        "unknown_role",
        "empty_turn",
        "wrong_type!",
        "no_answer",
        "wrong_type!",
    ],
    "moss.jsonl": [
        (0, "S:You are an AI assistant whose name is MOSS.", "U:弱势群体是谁？",
         "A:老人和孩子：\n\n1. 老人", "U:还有呢？", "A:残疾人。"),
        "tools",
        "wrong_keys!",
    ],
    "firefly.jsonl": [
        (0, "U:对联：春风", "A:秋雨"),
        (1, "U:怎么早起？", "A:早睡。"),
        "wrong_keys!",
    ],
    "lccc.json": [
        (0, "test", "U:火锅我在重庆吃iphone 6 plus很贵", "A:哈哈！"),
        "wrong_type!",
        ("0.1", "val", "U:生快", "A:谢谢", "U:晚安"),
        "no_answer",
        ("0.2", "train", "U:真的瘦了...", "A:T.T还要学Rap"),
    ],
    "lccc_lines.jsonl": [(0, "U:你好", "A:你好呀"), "wrong_type!"],
    "diamante_valid.json": [
        (0, "val", "U:夏天到了", "A:吃西瓜去", "U:走"),
        "bad_turns",
        "wrong_type!",
    ],
    "chatlm_mini_train.jsonl": [
        (0, "train", "U:鱼油有什么用？", "A:补充脂肪酸。"),
        "wrong_type!",
        "wrong_keys!",
    ],
    "llama_chinese.csv": [
        (0, "U:写一个标题，\n带引号。", 'A:"暴雨来袭"'),
        (1, "U:你好", "A:你好。", "U:几点了"),
        "text_outside_turns!",
        "text_outside_turns!",
        "bad_turns",
    ],
    "c3-m-dev.json": [
        (0, "val", "S:女：你喜欢喜剧片吗？\n男：喜欢。", "U:男的喜欢什么？", "A:喜剧片",
         "U:女的去过电影院。", "A:错误"),
        "no_answer",
        (1, "val", "S:只有一段。", "U:有几段？", "A:一段"),
        "wrong_type!",
        "no_reference!",
    ],
    "cmrc2018.json": [
        "no_question",
        (0, GINKGO, "U:果实叫什么？", "A:白果", "U:叶子什么时候变黄？", "A:秋天"),
        (1, GINKGO, "U:银杏是什么？", "A:一种树"),
        "wrong_keys!",
        "no_reference!",
    ],
    "squad.json": [
        "no_answer",
        (0, GINKGO, *(f"{who}第{n}个{what}" for n in range(8)
                      for who, what in (("U:", "问题？"), ("A:", "回答")))),
        ("0-1", GINKGO, "U:第8个问题？", "A:第8个回答", "U:第9个问题？", "A:第9个回答"),
        ("0-2", "S:第二段。", "U:第0个问题？", "A:第0个回答"),
        "wrong_keys!",
    ],
}  # fmt: skip


def module_of(place: str):
    stem = place.split(".")[0].split("-")[0]
    name = next((n for n in ("belle_multiturn", "chatlm_mini", "llama_chinese") if n in stem), "")
    return importlib.import_module(f"data_process.datasets.{name or stem.split('_')[0]}")


MODULES = {module_of(place) for place in EXPECTED}


def raw(place: str, directory: Path = FIXTURES) -> list[Record | Skip]:
    layout = getattr(module_of(place), "LAYOUT", "")
    return list(records(directory / place, "utf-8-sig", layout))


def told(item: dict | Skip) -> object:
    """The short form of a row or a Skip in which EXPECTED is written."""
    if isinstance(item, Skip):
        return item.reason + "!" * item.broken
    split = (item["split"],) if "split" in item else ()
    assert item.keys() == {"id", "messages"} | ({"split"} if split else set())
    turns = (f"{m['role'][0].upper()}:{m['content']}" for m in item["messages"])
    return (item["id"], *split, *turns)


def canonical(row: dict, module) -> str | None:
    """Why a row is not canonical once clean.py has fixed it."""
    row = {key: value for key, value in row.items() if key != "split"}
    fixed, _ = fix(row | {"id": f"x/{row['id']}"}, getattr(module, "RULES", module.KIND))
    return check_row(fixed)


@pytest.mark.parametrize("place", EXPECTED)
def test_every_record_becomes_the_expected_rows_and_skips(place):
    assert [told(item) for item in module_of(place).read(raw(place))] == EXPECTED[place]


@pytest.mark.parametrize("place", EXPECTED)
def test_what_a_reader_yields_is_canonical_once_it_is_fixed(place):
    module = module_of(place)
    rows = [item for item in module.read(raw(place)) if not isinstance(item, Skip)]
    assert rows and not any(canonical(row, module) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def mutants(data: object) -> list:
    """A value with each of its parts in turn replaced by one of another type."""
    changed = [junk for junk in (None, 3, "一", [3], {"x": 3}) if type(junk) is not type(data)]
    places = data if isinstance(data, dict) else range(len(data)) if type(data) is list else ()
    for key in places:
        for mutant in mutants(data[key]):
            changed.append(copy.copy(data))
            changed[-1][key] = mutant
    return changed


@pytest.mark.parametrize("place", EXPECTED)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(place):
    module = module_of(place)
    for record in (item for item in raw(place) if isinstance(item, Record)):
        for data in mutants(record.data):
            for item in module.read([record._replace(data=data)]):
                assert isinstance(item, Skip) or canonical(item, module) is None, data


def test_a_skip_of_a_damaged_line_passes_through_every_reader():
    skip = Skip("broken_json", "x.json:1", '{"text": ')
    assert {tuple(module.read([skip])) for module in MODULES} == {(skip,)}


def test_every_reader_says_where_its_data_come_from_and_under_which_licence():
    assert len(MODULES) == 20
    for module in MODULES:
        assert module.KIND == "chat" and module.LICENSE
        assert isinstance(module.SOURCE, Source) and module.SOURCE.home
        assert module.SOURCE.huggingface or module.SOURCE.modelscope or module.SOURCE.urls or (
            module.SOURCE.manual
        )  # fmt: skip


def test_only_sets_with_a_real_reference_text_keep_their_system_turn():
    kept = set()
    for place in EXPECTED:
        module = module_of(place)
        for row in module.read(raw(place)):
            fixed, _ = fix(row, getattr(module, "RULES", "chat")) if type(row) is dict else ({}, 0)
            if fixed and fixed["messages"][0]["role"] == "system":
                kept.add(place.split(".")[0])
    assert kept == {"redgpt", "c3-m-dev", "cmrc2018", "squad"}


def test_naturalconv_finds_its_split_in_whatever_order_the_files_are_read():
    module, entries = module_of("naturalconv"), raw("naturalconv")
    backwards = list(module.read(entries[::-1]))
    assert sorted(map(str, backwards)) == sorted(map(str, module.read(entries)))
    assert [row.get("split") for row in backwards if type(row) is dict] == [
        "test", "val", "train", None]  # fmt: skip


def test_a_squad_file_on_one_line_gives_the_rows_of_its_articles():
    module, articles = module_of("squad.json"), raw("squad.json")
    whole = articles[0]._replace(data={"version": "v2.0", "data": [articles[0].data]})
    assert list(module.read([whole])) == list(module.read(articles[:1]))
