"""Readers of dialogues and instructions: what becomes of each row of the fixtures, and why."""

import pytest
from reading import FIXTURES, check_wrong_types, fault, raw, read, reason, set_of

from data_process.clean import fix
from data_process.raw import Skip

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
        (5, GINKGO, "U:你好。", "A:你好。"),
    ],
    "naturalconv": [
        (4, "test", "U:新车站开了。", "A:离我家很近。"),
        (3, "val", "U:在吗？", "A:在，什么事？", "U:没事了。"),
        (2, "train", "U:你好。", "A:你好，看球赛了吗？", "U:看了，最后一分钟才进球。",
         "A:真紧张。"),
        (5, "U:这一段不在名单里。", "A:那就没有官方划分。"),
        "wrong_keys!",
    ],
    "kdconv_dev.json": [
        (0, "val", "U:你去过长城吗？", "A:去过，它有两万多公里长。", "U:真长。"),
        "no_answer",
        "no_answer",
        "unknown_columns",
    ],
    "pclue.json": [
        (0, "U:这条新闻是关于什么主题的？新闻：新增两条公交线路。选项：体育，交通", "A:交通"),
        (1, "U:文章里有哪些城市？", "A:北京，上海"),
        (2, "U:用自己的话写一句问候。", "A:早上好，今天过得怎么样？"),
        "target_not_a_choice",
        "cut_out_mark",
        "cut_out_mark",
        "no_target",
        "unknown_columns",
    ],
    "belle.json": [
        (0, "U:给出两条早睡的建议。", "A:1. 固定时间。\n2. 睡前不看手机。"),
        (1, "U:把下面的话写得礼貌些：关门。", "A:麻烦您关一下门。"),
        (2, "U:一加一？", "A:二。"),
        (3, "U:写出同义词\n高兴", "A:愉快"),
        ("3-1", "U:写出同义词\n美丽", "A:漂亮"),
        "wrong_type!",
        "evaluation_set",
        "unknown_columns",
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
        "bad_turns",
        "broken_json!",
    ],
    "alpaca.json": [
        (0, "U:把下面的句子改得更礼貌。\n把门关上。", "A:麻烦您把门关一下。"),
        (1, "U:写一句问候。", "A:早上好！"),
        (2, "U:说说春天。", "A:春天来了。"),
        (3, "U:这个词是什么意思？\n输入法", "A:打字用的软件。"),
        "placeholder",
        (5, "U:数字回答", "A:3"),
    ],
    "instruction.jsonl": [
        (0, "U:草莓甜吗？", "A:熟了就甜。"),
        (1, "S:你是一个有用的助手。", "U:问", "A:答", "U:再说一遍", "A:你好。"),
        (2, "U:今天几号？", "A:一号。"),
        "unknown_columns",
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
        "not_text",
        "no_answer",
        "wrong_type",
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
        "unknown_columns",
    ],
    "lccc.json": [
        (0, "test", "U:火锅我在重庆吃iphone 6 plus很贵", "A:哈哈！"),
        "wrong_type!",
        (2, "val", "U:生快", "A:谢谢", "U:晚安"),
        "no_answer",
        (4, "train", "U:真的瘦了...", "A:T.T还要学Rap"),
    ],
    "lccc_lines.jsonl": [(0, "U:你好", "A:你好呀"), "broken_json!"],
    "diamante_valid.json": [
        (0, "val", "U:夏天到了", "A:吃西瓜去", "U:走"),
        "bad_turns",
        "empty_turn",
    ],
    "chatlm_mini_train.jsonl": [
        (0, "train", "U:鱼油有什么用？", "A:补充脂肪酸。"),
        "no_answer",
        "unknown_columns",
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
        "unknown_columns",
        "no_reference!",
    ],
    "squad.json": [
        "no_answer",
        (0, GINKGO, *(f"{who}第{n}个{what}" for n in range(8)
                      for who, what in (("U:", "问题？"), ("A:", "回答")))),
        ("0-1", GINKGO, "U:第8个问题？", "A:第8个回答", "U:第9个问题？", "A:第9个回答"),
        ("0-2", "S:第二段。", "U:第0个问题？", "A:第0个回答"),
        "unknown_columns",
    ],
}  # fmt: skip


def name_of(place: str) -> str:
    stem = place.split(".")[0].split("-")[0]
    name = next((n for n in ("belle_multiturn", "chatlm_mini", "llama_chinese") if n in stem), "")
    return name or stem.split("_")[0]


NAMES = {name_of(place) for place in EXPECTED}


def told(item: dict | Skip) -> object:
    """The short form of a row or a Skip in which EXPECTED is written."""
    if isinstance(item, Skip):
        return reason(item)
    split = (item["split"],) if "split" in item else ()
    assert item.keys() == {"id", "messages"} | ({"split"} if split else set())
    turns = (f"{m['role'][0].upper()}:{m['content']}" for m in item["messages"])
    return (item["id"], *split, *turns)


@pytest.mark.parametrize("place", EXPECTED)
def test_every_record_becomes_the_expected_rows_and_skips(place):
    data_set = set_of(name_of(place))
    items = read(data_set, raw(FIXTURES / place, data_set))
    assert [told(item) for item in items] == EXPECTED[place]
    rows = [item for item in items if isinstance(item, dict)]
    assert rows and not any(fault(data_set, row, fixed=True) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("place", EXPECTED)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(place):
    check_wrong_types(set_of(name_of(place)), FIXTURES / place, fixed=True)


def test_only_sets_with_a_real_reference_text_keep_their_system_turn():
    kept = set()
    for place in EXPECTED:
        data_set = set_of(name_of(place))
        for row in read(data_set, raw(FIXTURES / place, data_set)):
            fixed, _ = fix(row, data_set.rules) if type(row) is dict else ({}, 0)
            if fixed and fixed["messages"][0]["role"] == "system":
                kept.add(place.split(".")[0])
    assert kept == {"redgpt", "c3-m-dev", "cmrc2018", "squad"}


def test_naturalconv_finds_its_split_in_whatever_order_the_files_are_read():
    data_set = set_of("naturalconv")
    entries = raw(FIXTURES / "naturalconv", data_set)
    backwards = read(data_set, entries[::-1])
    assert sorted(map(str, backwards)) == sorted(map(str, read(data_set, entries)))
    assert [row.get("split") for row in backwards if type(row) is dict] == [
        "test", "val", "train", None]  # fmt: skip


def test_a_squad_file_on_one_line_gives_the_rows_of_its_articles():
    data_set = set_of("squad")
    articles = raw(FIXTURES / "squad.json", data_set)
    whole = articles[0]._replace(data={"version": "v2.0", "data": [articles[0].data]})
    assert read(data_set, [whole]) == read(data_set, articles[:1])
