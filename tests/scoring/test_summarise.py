"""Titles by a checkpoint: order, room, ways to decode, the choice among replies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from babyllama.checkpoint import Loaded, load_model
from babyllama.config import REPO
from babyllama.cpu.decoder import make_decoder
from babyllama.errors import ConfigError
from babyllama.generate import generate_replies
from babyllama.sampling import SamplingConfig
from babyllama.scoring.beams import BeamConfig, search_beams
from babyllama.scoring.prompts import SummaryPrompts
from babyllama.scoring.summarise import (
    BEST,
    AskConfig,
    ReadyModel,
    ask_all,
    by_wording,
    decodings,
    ranked,
    suggest,
    summarise,
    templates,
)
from babyllama.scoring.tables import USUAL, System
from serving import endless_model, save

PROMPTS = REPO / "tests/small_prompts.yaml"
GREEDY = BeamConfig(max_new_tokens=8, temperature=0.0)
DRAWN = SamplingConfig(max_new_tokens=8, temperature=1.0, top_p=1.0, n=4, seed=3)
ASK = AskConfig(max_new_tokens=8, batch_size=2, prompts=PROMPTS)
TEXTS = [
    "小猫坐在窗台上看雨。雨停了。",
    "银杏是一种古老的树种，秋天叶子变黄。" * 20,
    "今天天气很好，我们去公园散步！",
    "老师说，学习要一步一步来。",
    "新的公交线路今天开通，市民出行更加方便。",
]


def wide_awake(checkpoint: Path) -> ReadyModel:
    """The checkpoint with weights so large that every text gets a title of its own."""
    loaded: Loaded = load_model(checkpoint)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
    return ReadyModel.of(loaded, "float32")


def prompts_of(model: ReadyModel, texts: list[str]) -> list[list[int]]:
    own, context = templates(PROMPTS, model.tokenizer), model.decoder.model.config.max_seq_len
    return [own.eval_prompt(text, context - 8)[0] for text in texts]


@pytest.mark.parametrize("way", [GREEDY, DRAWN, replace(GREEDY, beams=3, n=3)], ids=str)
def test_titles_come_in_the_order_of_the_texts_whatever_the_batches(checkpoint, way):
    way = replace(way, seed=0, n=1) if way is DRAWN else way
    model = wide_awake(checkpoint)
    together = summarise(model, TEXTS, way, 32, PROMPTS)
    assert len({each.title for each in together}) == 5
    assert [len(text) - each.n_read > 0 for text, each in zip(TEXTS, together, strict=True)] == [
        False, True, False, False, False
    ]  # fmt: skip
    if way.temperature == 0:  # drawn replies depend on their number in the batch
        assert summarise(model, TEXTS, way, 2, PROMPTS) == together
        assert [summarise(model, [text], way, 32, PROMPTS)[0] for text in TEXTS] == together


def test_a_reader_is_given_the_best_titles_of_the_search_that_is_scored(tmp_path, tokenizer):
    """All different, the same in every company, and how much of the text was read is told."""
    loaded = load_model(save(endless_model(tokenizer, 256), tokenizer, tmp_path / "small"))
    decoder = make_decoder(loaded.model, "float32")
    three, n_read, _ = suggest(decoder, tokenizer, TEXTS[0], 3)
    assert len(set(three)) == 3 and n_read == len(TEXTS[0])
    assert suggest(decoder, tokenizer, TEXTS[0]).titles == three[:1]
    (scored, _) = summarise(ReadyModel(decoder, tokenizer), TEXTS[:2])
    assert scored.titles[:3] == three
    long = TEXTS[1] * 9
    found = suggest(decoder, tokenizer, long)
    assert 0 < found.n_read < len(long)
    assert suggest(decoder, tokenizer, long[: found.n_read]) == found


def test_the_title_is_the_consensus_of_the_n_best(checkpoint):
    model, way = wide_awake(checkpoint), replace(GREEDY, beams=6, n=5)
    found = search_beams(model.decoder, prompts_of(model, TEXTS), way, model.tokenizer.eos_id,
                         model.tokenizer)  # fmt: skip
    own = templates(PROMPTS, model.tokenizer)
    wanted = [ranked([own.strip_frame(r.text.strip()).strip() for r in mine[:5]]) for mine in found]
    assert [each.titles for each in summarise(model, TEXTS, way, 12, PROMPTS)] == wanted
    assert any(
        mine[0].text.strip() != titles[0] for mine, titles in zip(found, wanted, strict=True)
    )


def test_of_drawn_replies_all_are_those_of_the_generator(checkpoint):
    model = wide_awake(checkpoint)
    prompt = prompts_of(model, TEXTS[2:3])
    tokenizer = model.tokenizer
    every = generate_replies(model.decoder, prompt, DRAWN, tokenizer.eos_id, tokenizer)
    assert ask_all(model, prompt, DRAWN, 8) == [every] and len({r.text for r in every}) > 1


def test_every_prompt_leaves_room_for_the_title(checkpoint):
    model = wide_awake(checkpoint)
    assert max(map(len, prompts_of(model, TEXTS))) == model.decoder.model.config.max_seq_len - 8
    with pytest.raises(ConfigError, match="leaves"):
        summarise(model, TEXTS, replace(GREEDY, max_new_tokens=120), 2, PROMPTS)


def test_template_words_are_no_title_but_the_texts_own_words_are(tokenizer):
    own = SummaryPrompts.load(REPO / "configs/prompts/summary_zh.yaml", tokenizer)
    title = "江请列出它的关键词"
    assert own.echoes(title, "一种图像去噪方法。") and not own.echoes(title, "请列出它的关键词。")
    assert not own.echoes("关键词提取方法", "提出关键词的提取方法。")
    for said in ("这段摘要的标题可以拟成：秋叶变黄", "可以叫《秋叶变黄》", "秋叶变黄"):
        assert own.strip_frame(said) == "秋叶变黄"
    assert own.strip_frame("标题党") == "标题党" and own.strip_frame("") == ""


def test_a_reply_with_template_words_loses_to_any_other(checkpoint, tmp_path):
    model, way = wide_awake(checkpoint), replace(GREEDY, beams=4, n=4)
    raw = yaml.safe_load(PROMPTS.read_text("utf-8"))
    first = summarise(model, TEXTS[:1], way, 8, PROMPTS)[0].titles
    assert len(first[0]) >= 4 and not any(first[0] in other for other in first[1:])
    usual = raw["eval"]["unseen"]
    for number, (echoed, wanted) in enumerate(((first[:1], first[1:]), (first, first))):
        raw["eval"]["unseen"] = [*usual, *(f"{title}{{text}}" for title in echoed)]
        prompts = tmp_path / f"{number}.yaml"
        prompts.write_text(yaml.safe_dump(raw, allow_unicode=True), "utf-8")
        assert set(summarise(model, TEXTS[:1], way, 8, prompts)[0].titles) == set(wanted)


def test_ways_to_decode_keep_what_the_settings_say_of_them():
    given = BeamConfig(max_new_tokens=8, temperature=0.0, top_p=0.7, n=3, beams=5, seed=2)
    ways = decodings("best, greedy,beam,top_p,greedy", given)
    assert list(ways) == ["best", "greedy", "beam", "top_p"]
    assert ways["best"] == replace(BEST, max_new_tokens=8)
    got = {name: (w.n, w.beams, w.temperature, w.top_p) for name, w in ways.items()}
    assert (got["greedy"], got["beam"]) == ((1, 1, 0.0, 0.7), (1, 5, 0.0, 0.7))
    assert got["top_p"] == (1, 1, 0.8, 0.7)
    assert decodings("", given) == {"": given}
    with pytest.raises(ConfigError, match="vote: wanted some of greedy"):
        decodings("greedy,vote", given)


def test_the_best_reply_is_the_one_most_like_the_others():
    near = ["图像去噪方法", "图像的去噪方法", "图像去噪的新方法", "银杏叶"]
    assert ranked(near)[0] in near[:3] and ranked(near)[-1] == "银杏叶"
    assert ranked([*near[::-1]])[0] in near[:3]
    # Said twice against one each: votes count.
    assert ranked(["甲", "乙", "丙", "乙"])[0] == "乙"
    assert ranked(["", "", "甲"]) == ["甲", ""]
    assert ranked(["甲", "乙"]) == ["甲", "乙"] and ranked([""]) == [""]
    # What the others say counts more than that nothing else is said; F1 would take the second.
    drafts = ["图像去噪", "图像去噪法", "基于小波变换的图像去噪方法", "图像去噪与小波变换方法"]
    assert ranked(drafts)[0] == drafts[3]


def test_another_wording_asks_another_question(checkpoint):
    model = wide_awake(checkpoint)
    unseen = templates(PROMPTS, model.tokenizer).unseen
    usual = summarise(model, TEXTS, GREEDY, 8, PROMPTS)
    assert usual != summarise(model, TEXTS, GREEDY, 8, PROMPTS, unseen[0])
    line = System("usual", [each.title for each in usual])
    found = by_wording(model, TEXTS, TEXTS, GREEDY, ASK, line)
    assert list(found["wordings"]) == [USUAL, *unseen]
