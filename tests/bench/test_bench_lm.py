"""The model behind the harness: likelihoods, replies, dialogues, and what is kept of them."""

import numpy as np
import pytest
import torch
from test_bench import fixed_model, learnt_vocabulary, slow_likelihood

from babyllama.checkpoint import Loaded, load_model
from babyllama.errors import ConfigError
from bench.harness import MOST_OPTIONS, Dialogue, Store, for_harness
from conftest import save_model
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Tokenizer:
    return learnt_vocabulary(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory, vocabulary) -> Loaded:
    place = tmp_path_factory.mktemp("bench") / "out/random"
    return load_model(
        save_model(place, fixed_model(vocabulary.vocab_size), vocabulary, "pretrain", 3)
    )


class Request:
    def __init__(self, *args: object) -> None:
        self.args = args


PAIRS = [
    ("今天天气", "很好"),
    ("今天天气", "不好，下雨了"),
    ("", "小猫坐在窗台上"),
    ("The sun is ", "a star"),
    ("问题：一加一？\n答案：", "二"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_likelihoods_do_not_depend_on_the_batch(batch_size, random_model):
    lm = for_harness(random_model, batch_size, False, Store(None, ""))
    found = lm.loglikelihood([Request(*pair) for pair in PAIRS])
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        if not context.endswith(" "):  # the space may belong to the next token
            wanted = slow_likelihood(random_model, context, continuation)
            assert value == pytest.approx(wanted, abs=1e-4)


def test_any_number_of_options_may_share_a_context(random_model):
    texts = [f"小猫坐在窗台上{n}" for n in range(2 * MOST_OPTIONS + 3)]
    lm = for_harness(random_model, 2, False, Store(None, ""))
    sizes, score = [], lm.score
    lm.score = lambda batch: sizes.append(max(len(g.numbers) for g in batch)) or score(batch)
    found = lm.loglikelihood([Request("", text) for text in texts])
    assert sizes and max(sizes) <= MOST_OPTIONS
    for n in (0, MOST_OPTIONS, len(texts) - 1):
        wanted = slow_likelihood(random_model, "", texts[n])
        assert found[n][0] == pytest.approx(wanted, abs=1e-4)


def test_a_continuation_that_merges_with_its_context_is_scored(random_model):
    """No word ends where Chinese text is cut: a token may hold both sides."""
    lm = for_harness(random_model, 2, False, Store(None, ""))
    tokenizer = lm.tokenizer
    word = next(w for w in ("秋天", "叶子", "是什么", "今天") if len(tokenizer.encode(w)) == 1)
    for context, end in ((word[0], word[1:]), ("小猫" + word[0], word[1:])):
        before, after = lm.encode_pair(context, end)
        assert after and (before + after if before != [lm.prefix_id] else after) == (
            tokenizer.encode(context + end)
        )
    found = lm.loglikelihood([Request(word[0], word[1:]), Request("", word)])
    assert found[0] == pytest.approx(found[1])


def test_a_continuation_is_greedy_if_the_model_would_say_it(random_model):
    lm = for_harness(random_model, 4, False, Store(None, ""))
    context = "今天天气"
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    (said,) = lm.generate_until([Request(context, settings)])
    ids = lm.tokenizer.encode(context)
    with torch.inference_mode():
        best = int(random_model.model(torch.tensor([ids]))[0, -1].argmax())
    lm.encode_pair = lambda before, after: (ids[:], [best] if after == "best" else [best ^ 1])
    found = lm.loglikelihood([Request(context, "best"), Request(context, "other")])
    assert [is_greedy for _, is_greedy in found] == [True, False] and said


def test_a_prompt_that_is_too_long_loses_its_beginning(vocabulary, tmp_path):
    model = fixed_model(vocabulary.vocab_size, max_seq_len=16)
    for kind in ("pretrain", "sft"):
        loaded = Loaded(model, vocabulary, 0, tmp_path, kind)
        lm = for_harness(loaded, 2, kind == "sft", Store(None, ""))
        cut = lm.cut(list(range(100, 140)), 15, is_dialogue=kind == "sft")
        head = list(range(100, 100 + lm.n_head)) if kind == "sft" and 2 * lm.n_head < 15 else []
        assert cut == head + list(range(125 + len(head), 140))
    ((value, _),) = lm.loglikelihood([Request("a", "很长的选项" * 20)])
    assert np.isfinite(value), "an option longer than the context loses its end"
    with pytest.raises(ConfigError, match="random replies"):
        lm.generate_until([Request("a", {"do_sample": True})])


def test_of_a_long_reference_the_sentences_that_answer_stay(random_model):
    lm = for_harness(replace_kind(random_model, "sft"), 4, True, Store(None, ""))
    text = "今天天气好。" * 60 + "苹果是红色的水果。" + "今天天气好。" * 60
    asked = [{"role": "user", "content": f"资料：{text}\n\n苹果是什么颜色？"}]
    prompt = lm.apply_chat_template(asked)
    ids = lm.encode_context(prompt)
    room = 60
    assert len(ids) > room and lm.fit(prompt, ids, len(ids)) == ids
    found = lm.tokenizer.decode(lm.fit(prompt, ids, room))
    assert "苹果是红色的水果。" in found and found.endswith("苹果是什么颜色？\n\n助手：")
    assert room - 10 < len(lm.fit(prompt, ids, room)) <= room
    assert len(lm.fit(prompt, ids, 12)) <= 12


def test_a_dialogue_reaches_the_model_as_the_chat_format_has_it(random_model):
    lm = for_harness(replace_kind(random_model, "sft"), 4, True, Store(None, ""))
    shots = [("system", "请回答。\n\n"), ("user", "问题：一？\n答案："), ("assistant", "1"),
             ("user", "问题：二？\n答案：")]  # fmt: skip
    prompt = lm.apply_chat_template([{"role": r, "content": c} for r, c in shots])
    assert isinstance(prompt, Dialogue)
    turns = [("user", "请回答。\n问题：一？"), ("assistant", "1"), ("user", "问题：二？")]
    messages = [{"role": r, "content": c} for r, c in turns]
    assert lm.encode_context(prompt) == lm.tokenizer.render_prompt(messages)
    about = lm.apply_chat_template(
        [{"role": "user", "content": "资料：甲。\n\n乙。\n\n问题：谁？\n答案："}]
    )
    assert about.messages == [
        {"role": "system", "content": "甲。\n\n乙。"}, {"role": "user", "content": "问题：谁？"}
    ]  # fmt: skip
    before, after = lm.encode_pair(prompt, "2")
    assert (before, after) == (lm.tokenizer.render_prompt(messages), lm.tokenizer.encode("2"))


def replace_kind(loaded: Loaded, kind: str) -> Loaded:
    return Loaded(loaded.model, loaded.tokenizer, loaded.step, loaded.path, kind)


def test_what_was_answered_is_not_asked_again(random_model, tmp_path):
    path = tmp_path / "answers.jsonl"
    pairs = [Request(*pair) for pair in PAIRS]
    first = for_harness(random_model, 2, False, Store(path, "x")).loglikelihood(pairs)
    whole = path.read_bytes()
    lost = b"\0" * 9 + b"\n"  # a lost block of the disk; and killed while it wrote
    path.write_bytes(lost + whole[: len(whole) // 2])
    store = Store(path, "x")
    n_kept = len(store.known)
    assert 0 < n_kept < len(PAIRS)
    lm = for_harness(random_model, 2, False, store)
    n_asked, score = [], lm.score
    lm.score = lambda batch: n_asked.extend(n for g in batch for n in g.numbers) or score(batch)
    again = lm.loglikelihood(pairs)
    assert [v for v, _ in again] == pytest.approx([v for v, _ in first])
    assert len(n_asked) == len(PAIRS) - n_kept and len(Store(path, "x").known) == len(PAIRS)
    assert Store(path, "x").key("a") != Store(path, "another checkpoint").key("a")
