"""Titles by a checkpoint: order, room, ways to decode, consensus, second questions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from babyllama.checkpoint import load_model
from babyllama.config import REPO
from babyllama.cpu.decoder import make_decoder
from babyllama.errors import ConfigError
from babyllama.generate import generate_replies
from babyllama.prompts import SummaryPrompts
from babyllama.sampling import SamplingConfig
from babyllama.scoring import probes
from babyllama.scoring import summarise as titles
from babyllama.scoring.summarise import (
    Asking,
    ask,
    consensus,
    decodings,
    replies,
    reply,
    suggest,
    summarise,
    summarise_together,
    templates,
    unframed,
)
from serving import endless_model, save

PROMPTS = REPO / "tests/small_prompts.yaml"
REAL_PROMPTS = REPO / "configs/prompts/summary_zh.yaml"
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)
HOW = Asking(GREEDY, PROMPTS, batch_size=2)
TEXTS = [
    "小猫坐在窗台上看雨。雨停了。",
    "银杏是一种古老的树种，秋天叶子变黄。" * 20,
    "今天天气很好，我们去公园散步！",
    "老师说，学习要一步一步来。",
    "新的公交线路今天开通，市民出行更加方便。",
]


def wide_awake(checkpoint: Path):
    """The checkpoint with weights so large that every text gets a title of its own."""
    loaded = load_model(checkpoint)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
    return loaded


def test_titles_come_in_the_order_of_the_texts_whatever_the_batches(checkpoint):
    loaded = wide_awake(checkpoint)
    prompts, n_cut = ask(loaded, TEXTS, HOW)
    one_by_one = [reply(loaded, [prompt], HOW)[0] for prompt in prompts]
    assert len(set(one_by_one)) == 5 and n_cut == 1
    assert reply(loaded, prompts, HOW) == one_by_one
    assert reply(loaded, prompts, replace(HOW, batch_size=32)) == one_by_one


def test_a_reader_is_given_the_best_titles_that_a_search_finds(tmp_path, tokenizer):
    """All different, the same in every company, and how much of the text was read is told."""
    loaded = load_model(save(endless_model(tokenizer, 256), tokenizer, tmp_path / "small"))
    decoder = make_decoder(loaded.model, "float32")
    three, n_read = suggest(decoder, tokenizer, TEXTS[0], 3)
    assert len(set(three)) == 3 and n_read == len(TEXTS[0])
    assert suggest(decoder, tokenizer, TEXTS[0]).titles == three[:1]
    long = TEXTS[1] * 9
    found = suggest(decoder, tokenizer, long)
    assert 0 < found.n_read < len(long)
    assert suggest(decoder, tokenizer, long[: found.n_read]) == found
    prompts = templates(titles.PROMPTS, tokenizer)
    ids, _ = prompts.eval_prompt(TEXTS[0], 200)
    (wanted,) = generate_replies(decoder, [ids], titles.TITLES, tokenizer.eos_id, tokenizer)
    assert three[0] == prompts.strip_frame(wanted.text.strip()).strip()


def test_every_prompt_leaves_room_for_the_title(checkpoint):
    loaded = load_model(checkpoint)
    prompts, _ = ask(loaded, TEXTS, HOW)
    assert max(map(len, prompts)) == loaded.config.max_seq_len - 8
    with pytest.raises(ConfigError, match="leaves"):
        ask(loaded, TEXTS, replace(HOW, sampling=replace(GREEDY, max_new_tokens=120)))


def test_a_lead_in_comes_off_and_nothing_else(checkpoint):
    titles = ["这段摘要的标题可以拟成：秋叶变黄", "可以叫《秋叶变黄》", "秋叶变黄", "标题党", ""]
    bare, n_framed = unframed(load_model(checkpoint), titles, REAL_PROMPTS)
    assert bare == ["秋叶变黄", "秋叶变黄", "秋叶变黄", "标题党", ""] and n_framed == 2


def test_ways_to_decode_keep_what_the_settings_say_of_them():
    given = SamplingConfig(max_new_tokens=8, temperature=0.0, top_p=0.7, n=3, beams=5, seed=2)
    ways = decodings("consensus, greedy,beam,top_p,greedy", given)
    assert list(ways) == ["consensus", "greedy", "beam", "top_p"]
    got = {name: (w.n, w.beams, w.temperature, w.top_p) for name, w in ways.items()}
    assert got == {
        "consensus": (3, 1, 0.8, 0.7), "greedy": (1, 1, 0.0, 0.7),
        "beam": (1, 5, 0.0, 0.7), "top_p": (1, 1, 0.8, 0.7),
    }  # fmt: skip
    assert decodings("", given) == {"": given}
    with pytest.raises(ConfigError, match="best: wanted some of greedy"):
        decodings("greedy,best", given)


def test_the_consensus_is_the_reply_most_like_the_others():
    near = ["图像去噪方法", "图像的去噪方法", "图像去噪的新方法", "银杏叶"]
    assert consensus(near) in near[:3] and consensus([*near[::-1]]) in near[:3]
    # Said twice against one each: votes count.
    assert consensus(["甲", "乙", "丙", "乙"]) == "乙"
    assert consensus(["", "", "甲"]) == "甲"
    assert consensus(["甲", "乙"]) == "甲" and consensus([""]) == ""
    # What the others say counts more than that nothing else is said; F1 would take the second.
    drafts = ["图像去噪", "图像去噪法", "基于小波变换的图像去噪方法", "图像去噪与小波变换方法"]
    assert consensus(drafts) == drafts[3]


def test_of_several_replies_the_consensus_is_given(checkpoint):
    loaded = wide_awake(checkpoint)
    drawn = SamplingConfig(max_new_tokens=8, temperature=1.0, top_p=1.0, n=4, seed=3)
    how = Asking(drawn, PROMPTS, batch_size=8)
    prompts, _ = ask(loaded, TEXTS[2:], how)
    chosen = reply(loaded, prompts[:1], how)
    from babyllama.generate import generate_replies

    tokenizer = loaded.tokenizer
    every = generate_replies(loaded.model, prompts[:1], drawn, tokenizer.eos_id, tokenizer)
    every = [one.text.strip() for one in every]
    assert len(set(every)) > 1 and chosen == [consensus(every)]
    assert len(reply(loaded, prompts, how)) == 3


def test_together_the_consensus_is_that_of_the_replies_of_all(checkpoint):
    systems = [wide_awake(checkpoint), wide_awake(checkpoint)]
    with torch.no_grad():
        systems[1].model.output.weight.copy_(systems[1].model.output.weight.flip(1))
    drawn = SamplingConfig(max_new_tokens=8, temperature=1.0, top_p=1.0, n=3, seed=3)
    how = Asking(drawn, PROMPTS, batch_size=8)
    each = []
    for loaded in systems:
        drafts = replies(loaded, ask(loaded, TEXTS, how)[0], how)
        assert [len(mine) for mine in drafts] == [3] * len(TEXTS)
        each.append([unframed(loaded, mine, PROMPTS)[0] for mine in drafts])
    wanted = [consensus([*a, *b]) for a, b in zip(*each, strict=True)]
    found = summarise_together(systems, TEXTS, how)
    assert found.titles == wanted and found.n_cut == summarise(systems[0], TEXTS, how).n_cut
    assert wanted != summarise(systems[0], TEXTS, how).titles


def test_another_wording_asks_another_question(checkpoint):
    loaded = load_model(checkpoint)
    prompts = SummaryPrompts.load(PROMPTS, loaded.tokenizer)
    usual = ask(loaded, TEXTS[:1], HOW)[0]
    assert usual != ask(loaded, TEXTS[:1], HOW, prompts.unseen[0])[0]
    assert summarise(loaded, TEXTS[:1], HOW, prompts.unseen[0]).seconds > 0


def test_the_second_question_follows_the_models_own_summary(checkpoint):
    loaded = load_model(checkpoint)
    tokenizer = loaded.tokenizer
    rows = [
        {"id": f"a/{i}", "text": text, "summary": "题", "meta": meta}
        for i, (text, meta) in enumerate(
            zip(TEXTS[:3], ({"discipline": "生物"}, {"discipline": "文学"}, {}), strict=True)
        )
    ]
    (found,) = probes.ask_follow_ups(loaded, rows, ["一", "二", "三"], HOW)
    assert found.name == "discipline" and found.rows == [0, 1] and len(found.answers) == 2
    prompts = SummaryPrompts.load(PROMPTS, tokenizer)
    for i in (0, 1):  # the second text is too long and loses its end, not the question
        ids = probes._prompt(loaded, prompts, rows[i], "一二", found.question, HOW)
        text = tokenizer.decode(ids)
        assert len(ids) <= 128 - 8
        assert text.count("助手：") == 2 and "一二" in text and found.question in text
    assert len(ids) == 128 - 8


def test_what_surrounds_an_answer_comes_off(tokenizer):
    prompts = SummaryPrompts.load(REAL_PROMPTS, tokenizer)
    turn = prompts.turns["keywords"]
    for said in ("银杏、树种", "关键词有：银杏、树种。", "这段摘要的关键词是：银杏、树种"):
        bare = probes.unframed(said, turn.answers, prompts.slots)
        assert probes.keywords_of(bare) == ["银杏", "树种"]
    labels = prompts.turns["discipline"].answers
    assert probes.unframed("属于生物学。", labels, prompts.slots) == "生物学"
    assert probes.unframed("生物学", labels, prompts.slots) == "生物学"


def test_keywords_match_whole_and_in_any_order():
    assert probes.keywords_of("AB模型、图像，去噪; 图像\nＡＢ") == [
        "ab模型",
        "图像",
        "去噪",
        "ab",
    ]
    same = probes.keyword_scores(["乙、甲"], [["甲", "乙"]])
    assert (same["f1"], same["precision"], same["recall"]) == (100, 100, 100)
    half = probes.keyword_scores(["甲、丙、丁、戊"], [["甲", "乙"]])
    assert (half["precision"], half["recall"]) == (25, 50)
    assert half["f1"] == pytest.approx(100 / 3)
    assert probes.keyword_scores([""], [["甲"]])["f1"] == 0


def test_labels_must_be_the_whole_answer():
    found = probes.label_scores(["生物学。", "生物学和文学", "文学"], ["生物学"] * 3)
    assert found["accuracy"] == pytest.approx(100 / 3)


def test_baselines_need_no_model():
    rows = [
        {"text": "银杏叶子变黄，银杏树种", "meta": {"keywords": ["银杏"], "discipline": "生物"}}
    ]
    words = probes.FollowUp("keywords", "？", [0], ["银杏"])
    found = probes.scores(words, rows)
    assert found["answers"]["f1"] == 100 and found["words the text repeats most"]["recall"] == 100
    label = probes.FollowUp("discipline", "？", [0], ["文学"])
    found = probes.scores(label, rows)
    assert found["answers"]["accuracy"] == 0 and found["always 生物"]["accuracy"] == 100
