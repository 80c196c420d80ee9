"""Laws of the wordings: many, drawn by their seed alone, the stored ids unchanged in each, and what
an answer adds to a summary comes off again."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from babyllama.errors import ConfigError
from babyllama.scoring.prompts import SummaryPrompts
from conftest import TEXTS
from data_process.pretokenize import as_content

SUMMARY_ZH = Path(__file__).parents[2] / "configs/prompts/summary_zh.yaml"


@pytest.fixture(scope="session")
def prompts(tokenizer) -> SummaryPrompts:
    return SummaryPrompts.load(SUMMARY_ZH, tokenizer)


@pytest.fixture(scope="session")
def row(tokenizer) -> tuple[list[int], list[int]]:
    return tokenizer.encode(TEXTS[0] * 2), tokenizer.encode("新公交线路开通")


def wording(prompts: SummaryPrompts, row: tuple, *key: int) -> list[dict]:
    return prompts.messages(*row, np.random.default_rng(key))


def as_text(prompts: SummaryPrompts, messages: list[dict]) -> str:
    return prompts.tokenizer.decode(prompts.tokenizer.render_chat(messages)[0])


def test_a_row_has_at_least_200_wordings(prompts, row):
    said = {as_text(prompts, wording(prompts, row, 0, epoch)) for epoch in range(1000)}
    assert len(said) >= 200


def test_no_wording_comes_of_two_choices(write_templates, tokenizer):
    path = write_templates(
        slots={"a": ["x", "y"], "b": ["1", "2", "3"]},
        families={
            "one": {"questions": ["{a}{text}", "{b}{text}"], "answers": ["{a}{summary}"]},
            "two": {"questions": ["{a}{text}"], "answers": ["{a}{summary}", "{summary}"]},
        },
    )
    prompts = SummaryPrompts.load(path, tokenizer)
    # {a}-{a}: 2, {b}-{a}: 6, {a}-{}: 2; the first family's first pair stands in the second, too.
    drawn = {
        as_text(prompts, prompts.messages([], [], np.random.default_rng(seed)))
        for seed in range(500)
    }
    assert len(drawn) == 10


def test_text_and_summary_stand_unchanged_in_every_wording(prompts, row):
    frames = set()
    for seed in range(2000):
        user, assistant = wording(prompts, row, seed)
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        for content, stored in ((user["content"], row[0]), (assistant["content"], row[1])):
            assert content.count(stored) == 1
        ids, mask = prompts.tokenizer.render_chat([user, assistant])
        answer = [token for token, learnt in zip(ids, mask, strict=True) if learnt]
        assert count(ids, row[0]) == 1 and count(answer, row[1]) == 1
        frames.add(tuple(tuple(part) for part in assistant["content"] if part is not row[1]))
        assert "{" not in as_text(prompts, [user, assistant])
    assert len(frames) > 50  # answers with a lead-in, in many words, and () without


def count(ids: list[int], part: list[int]) -> int:
    return sum(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def test_what_an_answer_adds_comes_off_again(prompts, row):
    plain = prompts.tokenizer.decode(row[1])
    n_framed = 0
    for seed in range(2000):
        answer = as_text(prompts, wording(prompts, row, seed)[1:]).removeprefix("助手：")
        assert prompts.strip_frame(answer) == plain
        n_framed += answer != plain
    assert 500 < n_framed < 1500


@pytest.mark.parametrize(
    "reply",
    ["", "标题", "可以叫《夜行", "夜行》", "标题可以是", "题目：夜行", "我想说：夜行",
     "我写的题目是", "这段文章的标题可以写：夜行", " 标题可以是：夜行"],
)  # fmt: skip
def test_a_reply_in_no_answers_words_is_left_as_it_is(prompts, reply):
    assert prompts.strip_frame(reply) == reply


def test_a_frame_comes_off_once_and_the_longest_first(write_templates, tokenizer):
    answers = ["{summary}", "A{summary}", "AB{summary}", "A{summary}Z", "{a}：{summary}"]
    right = {"one": {"questions": ["{a}{text}"], "answers": answers[:3]}}
    prompts = SummaryPrompts.load(write_templates(families=right), tokenizer)
    assert [prompts.strip_frame(r) for r in ("AABx", "ABAx", "AB", "xA")] == ["ABx", "Ax", "", "xA"]
    right["one"]["answers"] = answers
    with pytest.raises(
        ConfigError, match=r"answers that begin 'A' end in 'Z' or '', so it is open"
    ):
        SummaryPrompts.load(write_templates(families=right), tokenizer)


def test_question_and_answer_use_the_same_words(prompts, row):
    n_checked = 0
    for seed in range(500):
        user, assistant = (as_text(prompts, [m]) for m in wording(prompts, row, seed))
        for one, other in (("标题", "题目"), ("题目", "标题")):
            if one in assistant:
                assert other not in user
                n_checked += 1
    assert n_checked > 50


def test_a_wording_depends_on_its_seed_alone(prompts, row):
    first = [as_text(prompts, wording(prompts, row, 3, epoch, 5)) for epoch in range(20)]
    for epoch in reversed(range(20)):
        assert as_text(prompts, wording(prompts, row, 3, epoch, 5)) == first[epoch]
    assert len(set(first)) > 10


def frame_sizes(prompts: SummaryPrompts, row: tuple, n: int) -> list[int]:
    """How many ids each of `n` wordings adds to text and summary, dialogue format aside."""
    sizes = []
    for seed in range(n):
        contents = [m["content"] for m in wording(prompts, row, seed)]
        sizes.append(sum(len(piece) for content in contents for piece in content))
    return [size - len(row[0]) - len(row[1]) for size in sizes]


def test_no_wording_is_longer_than_the_longest(prompts, row, write_templates, tokenizer):
    assert max(frame_sizes(prompts, row, 2000)) <= prompts.longest
    path = write_templates(
        slots={"a": ["x", "long word"], "b": ["1", "333"]},
        families={
            "one": {"questions": ["{a}{text}{b}"], "answers": ["{summary}", "{a}!{summary}{b}"]},
            "two": {"questions": ["{b}{text}"], "answers": ["{summary}"]},
        },
    )
    few = SummaryPrompts.load(path, tokenizer)
    assert max(frame_sizes(few, row, 500)) == few.longest


def test_a_long_text_loses_its_end(prompts, row):
    for seed in range(20):
        user, _ = prompts.messages(*row, np.random.default_rng(seed), max_text=7)
        assert sum(list(piece) == row[0][:7] for piece in user["content"]) == 1


def test_words_that_are_named_like_a_slot_are_plain_words(write_templates, tokenizer):
    path = write_templates(
        families={"one": {"questions": ["text{text}"], "answers": ["summary{summary}"]}},
        question="text{text}",
    )
    prompts = SummaryPrompts.load(path, tokenizer)
    messages = prompts.messages([tokenizer.encode("a")[0]], tokenizer.encode("b"), rng(0))
    assert as_text(prompts, messages) == "人类：texta\n\n助手：summaryb"
    n_added = len(tokenizer.encode("text")) + len(tokenizer.encode("summary"))
    assert prompts.longest == n_added


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("max_ids", [60, 80, 100])
def test_the_scored_question_fits_and_reports_the_cut(prompts, tokenizer, max_ids):
    n_cut = 0
    for n in range(0, 120):
        text = (TEXTS[0] * 4)[:n]
        ids, lost = prompts.eval_prompt(text, max_ids)
        assert len(ids) <= max_ids
        whole = tokenizer.render_prompt(prompts.eval_messages(tokenizer.encode(text)))
        assert lost == max(0, len(whole) - max_ids)
        assert lost or ids == whole
        assert not lost or len(ids) == max_ids
        n_cut += lost > 0
    assert 0 < n_cut < 120


def test_a_text_is_asked_about_as_it_would_be_trained_on(prompts, tokenizer):
    typed = "助手：這是關於國際經濟發展問題的Ａ文\n\n助手：好"
    wanted = "「助手」：这是关于国际经济发展问题的A文\n\n「助手」：好"
    ids, n_cut = prompts.eval_prompt(typed, 500)
    assert wanted in tokenizer.decode(ids) and n_cut == 0
    as_row = tokenizer.encode(as_content(wanted, "summary"))
    assert prompts.text_ids(typed) == as_row == tokenizer.encode(wanted)
    assert as_content("\n\n助手：", "text") == "\n\n助手："


def test_the_scored_question_is_one_of_those_trained_on():
    raw = yaml.safe_load(SUMMARY_ZH.read_text("utf-8"))
    choices = {"text": "TEXT"} | {name: "|".join(words) for name, words in raw["slots"].items()}
    patterns = [
        re.sub(r"\{(\w+)\}", lambda slot: f"(?:{choices[slot[1]]})", question)
        for question in raw["families"]["alone"]["questions"]
    ]
    asked = raw["eval"]["question"].replace("{text}", "TEXT")
    assert any(re.fullmatch(pattern, asked) for pattern in patterns)


def test_the_scored_question_wants_the_title_alone():
    raw = yaml.safe_load(SUMMARY_ZH.read_text("utf-8"))
    assert raw["families"]["alone"]["answers"] == ["{summary}"]
    assert any(word in raw["eval"]["question"] for word in raw["slots"]["only"])
    assert all("{only}" in question for question in raw["families"]["alone"]["questions"])
    assert not any("{only}" in question for question in raw["families"]["open"]["questions"])


def test_twenty_questions_are_asked_that_no_training_shows(prompts, row, tokenizer):
    asked = {as_text(prompts, wording(prompts, ([], []), seed)[:1]) for seed in range(3000)}
    assert len(set(prompts.unseen)) == len(prompts.unseen) == 20
    for question in prompts.unseen:
        assert "人类：" + question.replace("{text}", "") not in asked
        ids, is_cut = prompts.eval_prompt(TEXTS[0] * 9, 120, question)
        assert is_cut and len(ids) == 120
        ids, is_cut = prompts.eval_prompt(TEXTS[0], 500, question)
        said = f"人类：{question.replace('{text}', TEXTS[0])}\n\n助手："
        assert not is_cut and tokenizer.decode(ids) == said


def test_an_answer_to_the_scored_question_is_the_summary_alone(prompts, row, tokenizer):
    asked = tokenizer.render_prompt(prompts.eval_messages(row[0]))
    answer = {"role": "assistant", "content": [row[1]]}
    ids, _ = tokenizer.render_chat([*prompts.eval_messages(row[0]), answer])
    assert ids == [*asked, *row[1], tokenizer.eos_id]


META = {"keywords": ["花卉", "公园", "天气"], "discipline": ["园艺学"]}


@pytest.fixture(scope="session")
def meta(tokenizer) -> dict[str, list[list[int]]]:
    return {name: [tokenizer.encode(word) for word in words] for name, words in META.items()}


def test_a_second_turn_asks_for_what_the_row_knows(prompts, row, meta, tokenizer):
    n_turns, said = {"keywords": 0, "discipline": 0}, set()
    for seed in range(1000):
        messages = prompts.messages(*row, rng(seed), meta=meta)
        assert messages[:2] == wording(prompts, row, seed)  # the first turn is what it was
        if len(messages) == 2:
            continue
        name = "keywords" if meta["keywords"][0] in messages[3]["content"] else "discipline"
        n_turns[name] += 1
        said.add(as_text(prompts, messages[2:]))
        assert [m["role"] for m in messages[2:]] == ["user", "assistant"]
        laid = [part for part in messages[3]["content"] if part in meta[name]]
        assert laid == meta[name]
        answer = as_text(prompts, messages[3:])
        assert "、".join(META[name]) in answer and "{" not in answer
    assert all(n > 150 for n in n_turns.values()) and 400 < sum(n_turns.values()) < 600
    assert len(said) > 50


def test_a_row_without_meta_has_no_second_turn(prompts, row, meta):
    for known in (None, {}, {"keywords": []}, {"level": meta["discipline"]}):
        sizes = {len(prompts.messages(*row, rng(seed), meta=known)) for seed in range(50)}
        assert sizes == {2}


def test_a_second_turn_never_shortens_the_text_nor_passes_the_room(prompts, row, meta, tokenizer):
    frame = [{"role": "user", "content": [[]]}, {"role": "assistant", "content": [[]]}]
    added = len(tokenizer.render_chat(frame)[0]) + prompts.longest
    text, summary = row
    n_turns = []
    for spare in range(0, 160, 4):
        n_turns.append(0)
        for seed in range(20):
            messages = prompts.messages(*row, rng(seed), len(text) + spare, meta)
            ids, _ = tokenizer.render_chat(messages)
            assert len(ids) <= added + len(text) + spare + len(summary)
            assert any(part == text for part in messages[0]["content"])
            n_turns[-1] += len(messages) == 4
    assert n_turns[0] == 0 and n_turns[-1] > 5
    assert all(len(prompts.messages(*row, rng(s), 9, meta)) == 2 for s in range(20))


def test_a_prompt_without_room_for_the_text_is_refused(prompts, tokenizer):
    empty = len(tokenizer.render_prompt(prompts.eval_messages([])))
    assert prompts.eval_prompt("文" * 99, empty + 16)[1]
    with pytest.raises(ConfigError, match=f"a prompt of {empty + 15} tokens leaves 15"):
        prompts.eval_prompt("文" * 99, empty + 15)


@pytest.fixture
def write_templates(tmp_path):
    """Makes a template file; what is not given is right."""

    def write(
        slots: object = None,
        families: object = None,
        question: object = "{text}？",
        unseen: object = (),
        following: object = None,
    ) -> Path:
        right = {"one": {"questions": ["{a}{text}"], "answers": ["{summary}"]}}
        content = {
            "slots": {"a": ["甲", "乙"]} if slots is None else slots,
            "families": right if families is None else families,
            "eval": {"question": question, "unseen": list(unseen)},
        }
        if following is not None:
            content["following"] = following
        path = tmp_path / "templates.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
        return path

    return write


def one_family(question: str = "{text}", answer: str = "{summary}") -> dict:
    return {"one": {"questions": [question], "answers": [answer]}}


def following(share: float = 0.5, name: str = "keywords", **changes: object) -> dict:
    turn = {"questions": ["{a}？"], "answers": ["{keywords}"]}
    return {"share": share, "turns": {name: turn | changes}}


def test_a_right_second_turn_is_read(write_templates, tokenizer):
    prompts = SummaryPrompts.load(write_templates(following=following(share=1)), tokenizer)
    laid = prompts.messages([3], [4], rng(0), meta={"keywords": [[5], [6]]})[3]["content"]
    assert laid == [[5], tokenizer.encode("、"), [6]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"families": one_family("{kind}：{text}")}, r"unknown slots \['kind'\]; add them"),
        ({"question": "{kind}：{text}"}, r"unknown slots \['kind'\]"),
        ({"families": one_family("{text}{summary}")}, r"unknown slots \['summary'\]"),
        ({"families": one_family("什么？")}, r"'什么？' must hold \{text\} exactly once"),
        ({"families": one_family("{text}{text}")}, r"must hold \{text\} exactly once"),
        ({"families": one_family(answer="好")}, r"'好' must hold \{summary\} exactly once"),
        ({"question": "标题？"}, r"'标题？' must hold \{text\} exactly once"),
        ({"slots": {"a": []}}, r"slot 'a' must be a list of words, found \[\]"),
        ({"slots": {"a": [1]}}, r"slot 'a' must be a list of words, found \[1\]"),
        ({"slots": {"a": ["{text}"]}}, r"slot 'a' must be a list of words"),
        ({"slots": []}, "wanted slots, families"),
        ({"families": {}}, "wanted families, each with a question"),
        ({"families": {"one": {"questions": ["{text}"]}}}, "misplaced: 'answers'"),
        ({"families": {"one": {"questions": ["{text}"], "answers": []}}}, "wanted families, each"),
        ({"question": None}, "wanted slots, families"),
        ({"slots": {"text": ["x"]}}, "slot 'text' is the name of a stored piece"),
        ({"unseen": ["什么？"]}, r"'什么？' must hold \{text\} exactly once"),
        ({"unseen": ["{kind}{text}"]}, r"unknown slots \['kind'\]"),
        ({"following": following(share=2)}, "following.share wants 0 to 1, found 2"),
        ({"following": {"turns": {}}}, "misplaced: 'share'"),
        ({"following": following(name="level")}, "following.turns.level: wanted one of keywords,"),
        ({"following": following(questions=[])}, "following.turns.keywords: wanted one of"),
        ({"following": following(answers=["好"])}, r"'好' must hold \{keywords\} exactly once"),
        ({"following": following(questions=["{text}？"])}, r"unknown slots \['text'\]"),
        ({"following": following(answers=["{b}{keywords}"])}, r"unknown slots \['b'\]"),
        ({"following": following(extra=1)}, "missing or misplaced: .*extra"),
    ],
    ids=str,
)
def test_a_wrong_template_file_is_refused(write_templates, tokenizer, changes, message):
    path = write_templates(**changes)
    with pytest.raises(ConfigError, match=rf"templates\.yaml: .*{message}"):
        SummaryPrompts.load(path, tokenizer)


def test_every_fault_is_named_at_once(write_templates, tokenizer):
    path = write_templates(families=one_family("{x}", "{y}"), question="{z}{text}")
    with pytest.raises(ConfigError) as error:
        SummaryPrompts.load(path, tokenizer)
    assert [name in str(error.value) for name in "xyz"] == [True] * 3


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"slots: {", b"slots: {a: [\xd6\xd0]}"],
    ids=["empty", "list", "cut", "gbk"],
)
def test_a_file_that_is_no_template_file_is_refused(tmp_path, tokenizer, data):
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.yaml: wanted slots, families"):
        SummaryPrompts.load(tmp_path / "x.yaml", tokenizer)


def test_a_missing_template_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no such file"):
        SummaryPrompts.load(tmp_path / "x.yaml", tokenizer)
