"""No text costs more than its length: every fix, rule and reader on its worst input.

A row may have a megabyte. What grows with the length takes some milliseconds for QUICK characters;
what grows with its square, seconds. The slow test measures the growth from 10,000 to 100,000
characters, and up to a megabyte where that is not plainly the text's.
"""

import json
from collections.abc import Callable, Iterator
from time import process_time

import pytest
from reading import read, set_of

from babyllama.language.letters import plain
from data_process import clean
from data_process.raw import Record

QUICK, QUICK_S = 20_000, 0.1
SIZES = (10_000, 100_000, 1_000_000)
LINEAR_S, NOISE_S = 0.1, 0.005  # of the second of these, what is plainly fast; what decides nothing
SLACK_S = 0.3  # what measuring adds to the time of a step

# What regular expressions begin with, repeat, or wait for in vain.
UNITS = (
    "<think>", "<think></think> ", "<a ", "<a b=", "<a b='", "<p>", "<!--", "<", "&", "&#1", "&lt;",
    "&#" + "1" * 50, " ", "\n", " \n", "\u3000", "(", "（，", "( ", "[1", "[12]", "《", "「", "。",
    "作者：a\n", "链接：  ", "著作权归作者所有", "_", "-", "--", " - ", "|", "｜", "【", "标题：",
    "点击上方关注", "原标题：", "编辑：", "? ", "?", "？", "！", "!a", "为什么", "...", "…",
    "aa", "一", "1", "Human", "\nHuman ", "\n\n助手：", "\n\n助手", "我是", "由openai", "很抱歉",
    "作为一个", "國", "a\n", "一二三四五六七\n", "e\u0301", "\u0301\u0316", "０", "\u200b", "\r",
    "\\n", "（）", "=", "\n:", "\n*", ":", "#",
    "```", "```\n", "**", "*a", "[a](", "[**", "`", "<s>", "<s>Human:", "</s>", "Human:", "Human (",
    "答案：", "<<", "<<1", "####", "<Paragraph> ", "<eoh> ", "#idiom", "Question: ", "Passage: ",
    '"会话":"a', "null,", "问：",
)  # fmt: skip


def texts(unit: str, size: int) -> Iterator[str]:
    """A unit over and over, also with an end that does not fit; with space or letters behind it."""
    many = unit * (size // len(unit))
    yield from (many, f"{many}x", f"{unit}{' ' * size}x", f"{unit}{'x' * size}")


def seconds(what: Callable[[str], object], text: str) -> float:
    start = process_time()
    what(text)
    return process_time() - start


def rows(text: str) -> Iterator[dict]:
    """A text in each place of a row that a fix or a rule looks at."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    yield from (
        {"id": "x/0", "text": text, "summary": "一二三四五六七"},
        {"id": "x/0", "text": text, "summary": text},
        {"id": "x/0", "text": text, "summary": text[:2]},
        {"id": "x/0", "messages": turns},
    )


def on_rows(name: str) -> Callable[[str], None]:
    def run(text: str) -> None:
        for row in rows(text):
            functions = DIALOGUES if "messages" in row else DOCUMENTS
            if name in functions:
                functions[name](row)

    return run


def of(kinds: tuple[str, ...]) -> dict[str, Callable]:
    table = clean.FIX | clean.RULE
    used = (names for kind in kinds for names in clean.ways()[kind].values())
    return {name: table[name] for names in used for name in names}


DOCUMENTS = of(("text", "summary", "article", "headline"))
DIALOGUES = of(("chat", "reference", "exam", "vqa", "smalltalk"))
FUNCTIONS = {name: on_rows(name) for name in DOCUMENTS | DIALOGUES} | {"plain": plain}


def reading(name: str, *templates: object) -> Callable[[str], None]:
    """A reader at work on records into which a text is put in the place of "T"."""
    data_set = set_of(name)

    def filled(value: object, text: str) -> object:
        if isinstance(value, dict):
            return {key: filled(inner, text) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner, text) for inner in value]
        return value.replace("T", text) if isinstance(value, str) else value

    def run(text: str) -> None:
        for data in templates:
            read(data_set, [Record(0, "a:1", None, filled(data, text))])

    return run


READERS = {
    "instruction": reading("instruction", {"instruction": "a", "input": "T", "output": "T"}),
    "conversations": reading("conversations", {"conversations": ["T", "T"]},
                             {"messages": [{"role": "user", "content": "T"}] * 2}),
    "redgpt": reading("redgpt", {"reference": "T", "dialogue": "Human: T\nAssistant: T"},
                      {"reference": "a", "dialogue": "T"}),
    "belle_multiturn": reading("belle_multiturn", {"instruction": "T", "output": "T"}),
    "llama_chinese": reading("llama_chinese", {"text": "T"}),
    "lccc": reading("lccc", ["T", "T"]),
    "moss": reading("moss", {"chat": {"1": {"Human": "T", "MOSS": "T", "Commands": "T"}}}),
    "pclue": reading("pclue", {"input": "T", "target": "T"}),
    "gsm8k": reading("gsm8k", {"question": "T", "answer": "T#### 1"}),
    "boolq": reading("boolq", {"query": "T", "gold": 1}, {"query": "Passage: T", "gold": 1}),
    "squad": reading("squad", {"context": "T", "qas": [{"q": "T", "a": "T"}]}),
    "csl": reading("csl", "T\tT", {"abst": "T", "title": "T", "keyword": "T"}),
    "pairs": reading("pairs", {"text": "T", "title": "T", "keywords": "T"}),
    "lcsts": reading("lcsts", {"text": "T", "summary": "a"}),
    "nlpcc2017": reading("nlpcc2017", {"article": "T", "summarization": "T"}),
    "text": reading("text", {"text": "T", "title": "T"}),
    "law": reading("law", {"text": "T"}),
    "baike563w": reading("baike563w", {"title": "T", "summary": "T"}),
    "mnbvc": reading("mnbvc", {"text": "T"}, {"问": "T", "答": "T", "元数据": {"扩展字段": "T"}}),
    "vqa": reading("vqa", {"image": "T", "qa": [{"question": "T", "answer": "T"}]}),
    "wiki": reading("wiki", {"text": "T", "title": "T"}),
}  # fmt: skip
ALL = FUNCTIONS | READERS


@pytest.mark.parametrize("name", ALL)
def test_no_text_of_some_thousand_characters_takes_long(name: str) -> None:
    for unit in UNITS:
        for number, text in enumerate(texts(unit, QUICK)):
            took = seconds(ALL[name], text)
            assert took < QUICK_S or seconds(ALL[name], text) < QUICK_S, (unit, number, took)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_time_grows_no_faster_than_the_text(name: str) -> None:
    for unit in UNITS:
        small, middle = (list(texts(unit, size)) for size in SIZES[:2])
        for number in range(4):
            took = [seconds(ALL[name], text[number]) for text in (small, middle)]
            if took[1] > min(LINEAR_S, 25 * took[0] + NOISE_S):
                assert took[1] < 25 * took[0] + SLACK_S, (unit, number, took)
                took.append(seconds(ALL[name], list(texts(unit, SIZES[2]))[number]))
                assert took[2] < 25 * took[1] + SLACK_S, (unit, number, took)


def test_a_row_of_300_kilobytes_of_open_thoughts_is_cleaned_at_once() -> None:
    text = "<think>" * 43_000
    row = json.loads(json.dumps({"id": "x/0", "messages": [
        {"role": "user", "content": "问"}, {"role": "assistant", "content": text}]}))  # fmt: skip
    assert seconds(lambda _: clean.fix(row, "chat"), "") < 1
