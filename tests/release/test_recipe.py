"""Laws of the recipe's own steps: papers, passages, talk, and how talk is scored."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from babyllama.config import REPO
from babyllama.decoder import Reply
from babyllama.rows import check_messages, write_rows
from data_process.decontaminate import digests, is_kept
from data_process.raw import records
from data_process.registry import data_sets
from release.recipe import openings, papers, passages, talk

RECIPE = REPO / "release/recipe"
TEXT = (
    "红楼书院位于江南的小镇。书院由张三创办，1923年第一次招生。"
    "因为经费不足，书院关闭了两次，现有学生300名。本文提出了一种新的选课方法。"
)
ABSTRACT = "为了提高稻田的产量，提出了一种新的灌溉方法。试验结果表明，产量提高了12%。方法简单可行。"
WORDS = yaml.safe_load((RECIPE / "wordings.yaml").read_text("utf-8"))


def names_of(config: str) -> set[str]:
    sets = yaml.safe_load((RECIPE / f"{config}.yaml").read_text("utf-8"))["sets"]
    return {one["name"] for one in sets}


def sources_of(stage: str) -> set[str]:
    sources = yaml.safe_load((RECIPE / f"{stage}.yaml").read_text("utf-8"))["data"]["sources"]
    names = [source["name"] for source in sources]
    assert len(set(names)) == len(names)
    return set(names)


def test_the_stages_read_every_set_that_is_made_and_no_other():
    made = names_of("text") | names_of("titles") | names_of("dialogues")
    read = [sources_of(stage) for stage in ("pretrain/base", "pretrain/decay", "sft/chat")]
    assert set().union(*read) == made
    assert read[0] == names_of("text")  # the first stage reads text alone
    assert not any(name.startswith("f_") for name in read[2])  # the last one no text


def test_a_made_question_is_answered_by_the_text_and_does_not_hold_its_answer():
    found = {}
    for seed in range(40):
        found |= dict(passages.questions(TEXT, random.Random(seed)))
    for question, answer in found.items():
        assert question.endswith("？") and answer in TEXT and answer not in question
    assert found["红楼书院位于哪里？"] == "江南的小镇"
    assert found["书院由谁创办？"] == "张三"
    assert found["哪一年第一次招生？"] == "1923年"
    assert found["现有学生多少名？"] == "300名"
    assert found["为什么书院关闭了两次？"] == "经费不足"
    assert found["提出了什么方法？"] == "一种新的选课方法"


@pytest.mark.parametrize("longest", [20, 40, 60, 500])
def test_a_passage_that_is_cut_holds_whole_sentences_and_the_answers(longest):
    long = TEXT * 4
    for seed in range(50):
        cut = passages.cut_round(long, ["1923年"], longest, random.Random(seed))
        assert "1923年" in cut and cut in long and cut[-1] in "。"
        assert len(cut) <= max(longest + len("书院由张三创办，1923年第一次招生。"), 30)


def test_the_leading_sentence_is_that_with_most_in_common_and_is_taken_out():
    text = "稻田灌溉影响稻田产量和用水。稻田产量取决于灌溉。用水越多成本越高。天气晴朗适合出游。"
    rest, sentence = passages.lead(text)
    assert sentence == "稻田灌溉影响稻田产量和用水"
    assert rest == text.replace(sentence + "。", "")
    assert passages.lead("一句。两句。") is None


def test_a_question_of_another_passage_is_answered_by_saying_so():
    rows, refusals = [], set(WORDS["unanswered"])
    for seed in range(30):
        asking = passages.Asking(unanswered=1.0, seed=seed)
        asking.row("别的资料里写着月亮湖。", [("湖叫什么名字？", "月亮湖")])
        rows.append(asking.row(TEXT, [("书院由谁创办？", "张三")]))
    for row in rows:
        said = re.findall(r"Assistant: (.*)", row["dialogue"])
        assert refusals & set(said) and set(said) <= refusals | {"张三"}
    assert any("张三" in row["dialogue"] for row in rows)


def test_talk_about_a_paper_never_is_a_title_alone_and_says_what_is_known():
    one = papers.paper(
        {"abstract": ABSTRACT, "title": "稻田灌溉方法", "keywords": ["稻田", "灌溉"],
         "discipline": "农学", "tldr": "一种灌溉方法。 (A method that raises the yield of rice.)"},
        papers.Source("x"),
    )  # fmt: skip
    assert one.known["gist"] == "一种灌溉方法。"
    maker = papers.Talk(seed=0)
    rows = [maker.about(one) for _ in range(300)]
    dialogues = [row["messages"] for row in rows if row]
    assert len(dialogues) > 250
    for messages in dialogues:
        assert check_messages(messages) is None
        text = "".join(message["content"] for message in messages)
        assert "{" not in text and text.count(ABSTRACT) == 1 and ABSTRACT in messages[0]["content"]
        titles = [m["content"] for m in messages[1::2] if "稻田灌溉方法" in m["content"]]
        assert len(messages) > 2 or not titles
    answers = {message["content"] for messages in dialogues for message in messages[1::2]}
    assert {"稻田、灌溉", "农学", "一种灌溉方法。", "一种新的灌溉方法"} <= answers
    assert any(answer.startswith("摘要里没有提到") for answer in answers)


def test_what_templates_call_a_title_is_the_word_and_not_the_title():
    # A slot named like a field once put the title itself into the question.
    maker = papers.Talk(seed=1)
    one = papers.Paper("k", ABSTRACT, "稻田灌溉方法", {"title": "稻田灌溉方法", "keywords": "稻田"})
    asked = [
        m["content"] for _ in range(200) for m in (maker.about(one) or {"messages": []})["messages"]
    ][::2]
    assert asked and not any("稻田灌溉方法" in question for question in asked)


def test_titles_that_share_a_window_with_a_kept_out_text_are_dropped(tmp_path: Path):
    titles = [
        f"{crop}节水灌溉的产量与效益分析方法研究进展"
        for crop in "稻麦豆薯棉麻茶桑果菜桃李杏梨柑枣瓜花草树竹藕"
    ]
    # Where the titles differ; one window in eight is on such lists.
    own = [digests(title)[:1] for title in titles]
    kept = [n for n, numbers in enumerate(own) if is_kept(numbers).any()]
    assert 0 < len(kept) < len(titles)
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(f"to category\t{title}\t农学" for title in titles), "utf-8")
    numbers = np.sort(np.concatenate([own[n] for n in kept]))
    (tmp_path / "kept.u64").write_bytes(numbers.astype("<u8").tobytes())
    left = [title for title, _ in papers.titles_alone(path, [tmp_path / "kept.u64"])]
    assert left == [title for n, title in enumerate(titles) if n not in kept]
    assert len(papers.titles_alone(path, [])) == len(titles)


def test_the_readers_take_what_is_written(tmp_path: Path):
    paper = papers.paper({"text": ABSTRACT, "summary": "稻田灌溉", "keywords": ["稻田"]},
                         papers.Source("x"))  # fmt: skip
    write_rows(tmp_path / "titles/train.jsonl", [papers.title_row(paper)])
    write_rows(tmp_path / "about/train.jsonl", [papers.Talk(3).about(paper)])
    write_rows(tmp_path / "asked/train.jsonl", [passages.grounded(TEXT, [("问？", "答\n二")])])
    (title,), (about,), (asked,) = (
        list(data_sets(reader)[0].read(records(tmp_path / name, "utf-8")))
        for reader, name in (("csl", "titles"), ("conversations", "about"), ("redgpt", "asked"))
    )
    assert title["summary"] == "稻田灌溉" and title["meta"] == {"keywords": ["稻田"]}
    assert about["messages"][0]["role"] == "user"
    assert [m["content"] for m in asked["messages"]] == [TEXT, "问？", "答\n二"]


def test_a_talk_keeps_its_words_and_two_of_a_list_differ():
    slots = {"food": ["面", "饭", "饼"]}
    rows = talk.drawn([["吃{food}|要{food}", "{food}好，{food2}也好"]], slots, most=300, seed=0)
    said = {tuple(message["content"] for message in row["messages"]) for row in rows}
    assert len(said) == len(rows) == 2 * 3 * 2  # each wording once
    for asked, answer in said:
        food, other = answer[0], answer[3]
        assert asked[1:] == food != other


def test_the_talks_of_the_project_can_all_be_drawn_and_hold_no_opening():
    own = yaml.safe_load((RECIPE / "talk.yaml").read_text("utf-8"))
    rows = talk.drawn(own["talks"], own["slots"], most=36, seed=0)
    assert len(rows) > 4000
    for row in rows:
        assert check_messages(row["messages"]) is None
        assert not re.search(r"[{}|]", "".join(m["content"] for m in row["messages"]))


def test_joined_talk_holds_whole_dialogues():
    singles = [papers.turn(f"问{i}", f"答{i}") for i in range(9)]
    about = [papers.turn("摘要", "题目") + papers.turn("谢谢", "不客气")]
    rows = [row["messages"] for row in talk.joined(singles, about, 200, seed=0)]
    turns = [
        tuple(m["content"] for m in row[i : i + 2]) for row in rows for i in range(0, len(row), 2)
    ]
    assert set(turns) == {(f"问{i}", f"答{i}") for i in range(9)} | {
        ("摘要", "题目"),
        ("谢谢", "不客气"),
    }
    assert 40 < turns.count(("摘要", "题目")) < 120


def reply(text: str, reason: str = "eos") -> Reply:
    return Reply(text=text, reason=reason)


@pytest.mark.parametrize(
    "text, reason, wanted",
    [
        ("下雨天记得带伞。", "eos", None),
        ("今天是星期三。", "eos", "off_subject"),
        ("恭喜你！带好伞。", "eos", "wrong_word"),
        ("伞的标题可以是：雨中", "eos", "wrong_word"),
        ("外面在下雨", "eos", "echo"),
        ("。。", "eos", "blank"),
        ("带伞" * 40, "eos", "loops"),
        ("记得带伞，然后", "length", "no_end"),
    ],
)
def test_a_reply_is_judged_by_its_words_and_its_end(text, reason, wanted):
    turn = {"say": "外面在下雨。", "must": "伞|淋", "must_not": "恭喜"}
    assert openings.fault(reply(text, reason), turn) == wanted


def test_forty_openings_that_nobody_trains_on(tmp_path: Path, script):
    asked = openings.read_openings()
    assert len(asked) == 40 and all(len(turns) == 2 for turns in asked)
    for turn in (turn for turns in asked for turn in turns):
        re.compile(turn["must"]), re.compile(turn["must_not"])
        assert turn["must"] and turn["must_not"]
    own = yaml.safe_load((RECIPE / "talk.yaml").read_text("utf-8"))
    rows = talk.drawn(own["talks"], own["slots"], most=36, seed=0)
    identity = (RECIPE / "identity.jsonl").read_text("utf-8").splitlines()
    rows += [{"messages": papers.turn(*json.loads(line).values())} for line in identity]
    write_rows(
        tmp_path / "talk/train-00000.jsonl", ({"id": f"t/{i}", **r} for i, r in enumerate(rows))
    )
    done = script("release/recipe/openings.py", "--rows", f"[{tmp_path / 'talk'}]")
    assert done.code == 0 and "none of 40 openings" in done.out, done.err
    say = asked[0][0]["say"]
    write_rows(tmp_path / "bad/train-00000.jsonl",
               [{"id": "b/0", "messages": papers.turn(f"哎，{say}！", "辛苦了。")}])  # fmt: skip
    done = script("release/recipe/openings.py", "--rows", f"[{tmp_path / 'bad'}]")
    assert "b/0" in done.error and done.code == 2


def test_the_conversations_go_on_with_the_models_own_replies(checkpoint, tmp_path, script):
    out = tmp_path / "said.jsonl"
    done = script("release/recipe/openings.py", checkpoint, "--max_new_tokens", 4, "--out", out)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["way"] for row in rows] == ["greedy"] * 40 + ["drawn"] * 40
    assert all(len(row["messages"]) == 4 and len(row["faults"]) == 2 for row in rows)
    assert re.search(r"greedy +sensible +\d+\.\d %", done.out)
