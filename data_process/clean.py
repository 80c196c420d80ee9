"""Cleaning of rows between reading and writing: first fixes, then rules.

A fix changes a row (FIXES), a rule says that a row must go (RULES); both tables have one line
for each way of cleaning, usually named after the kind of the rows. The name of a function is
the name under which it is counted, and by which --skip_rules switches it off. Lists of words
stand in words.yaml. Duplicates belong to dedup.py.
"""

import functools
import html
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from html.entities import html5
from pathlib import Path

import yaml

from babyllama import rows
from babyllama.errors import ConfigError
from data_process.formats import past
from tokenizer import LABELS, SEPARATOR

HAN = re.compile("[\u4e00-\u9fff]+")
SPACE = re.compile(r"\s+")


def han_share(text: str) -> float:
    """The share of Han characters among those that are not space."""
    solid = SPACE.sub("", text)
    return 1 - len(HAN.sub("", solid)) / len(solid) if solid else 0.0


Row = dict
WORDS = Path(__file__).with_name("words.yaml")


@functools.cache
def _words(name: str) -> re.Pattern[str]:
    return re.compile("|".join(yaml.safe_load(WORDS.read_text("utf-8"))[name]))


def n_words(name: str, text: str) -> int:
    """How often words of a list in words.yaml stand in a text."""
    return len(_words(name).findall(text))


# Fixes.
TITLE_TAILS = (
    re.compile(r"_.*"),
    re.compile(r"[|｜].*"),
    re.compile(r"(?:--|\s[-–—]\s).*"),
    re.compile(r"[-–—][^-–—]{0,12}(?:网|新闻|论坛|频道|在线|公司|头条)\S{0,6}$"),
)
TITLE_LABEL = re.compile(
    r"^(?:\[[^\]]{1,8}\]|【[^】]{1,8}】|「[^」]{1,8}」|标题[:：]|原标题[:：]|\w{1,8}\s?[|｜丨])\s*"
)
LEAST_TITLE = 6

HEAD_LINE = re.compile(
    r"^(?:[^\n。]{0,20}(?:点击?上方|点击?蓝字|点上方|蓝色字)[^\n。，]{0,40}?"
    r"(?:关注(?:我们|哦|吧)?|订阅(?:本刊)?|阅读)[!！。，]?"
    r"|[(（]?原标题[:：][^\n]{0,80}(?:\n|$)|内容摘要[:：]|核心提示[:：])\s*"
)
TAIL = re.compile(
    r"\s*(?:返回搜狐|查看更多|特别声明[:：]|免责声明[:：]|声明[:：]|本文来自大风号|本文为一点号"
    r"|责任编辑|责编|见习编辑|[(（](?:责任编辑|责编|编辑)|此稿由网友上传|视频来自[:：]|图片来源[:：]"
    r"|阅读全文|我要反馈|举报本文|分享到[:：]|相关阅读[:：]|文章关键词|更多精彩[:：]?|\(admin\)"
    r"|长按.{0,6}二维码|长按识别|扫.{0,4}二维码|转载请注明|版权归原作者|如有侵权|欢迎转载"
    r"|新媒体协会|广告合作|原标题[:：]?).*$",
    re.DOTALL,
)
CREDIT = re.compile(
    r"\s*[(（【]?(?:[^\s，。！？]{0,4}编辑|来源|编审|监制|校对|编译|供稿|运营人员|文/图|图/文|作者)"
    r"[:：｜|].{0,40}$"
)
LOST_SPACES = re.compile(r"(?:\?[ \n]+)+\?|^\?+|\? *$")
TAIL_REACH = 300  # a tail starts this near the end; further inside it may be part of the story


def cut_title_tail(row: Row) -> Row:
    """Site names, key words and labels round a headline go, if a headline is left.

    The name of a forum stays: the rule `forum` drops the row by it.
    """
    title = row["summary"].replace("\n", " ")
    if n_words("forum", title):
        return row | {"summary": title}
    for pattern in (*TITLE_TAILS, TITLE_LABEL, TITLE_LABEL):
        shorter = pattern.sub("", title, count=1).rstrip()
        if len(shorter) >= LEAST_TITLE:
            title = shorter
    return row | {"summary": title.strip()}


def cut_site_text(row: Row) -> Row:
    """ "Tap above to follow us", disclaimers, editors and the like go from both ends."""
    text = LOST_SPACES.sub("", row["text"]) if "?" in row["text"] else row["text"]
    head = HEAD_LINE.match(text)
    text = text[head.end() :] if head else text
    start = max(len(text) - TAIL_REACH, 0)
    tail = CREDIT.sub("", TAIL.sub("", text[start:]).rstrip())
    return row | {"text": (text[:start] + tail).strip()}


BEHIND_TITLE = re.compile(r"[ \n:：,，。!！?？…]*")


def cut_repeated_title(row: Row) -> Row:
    """A body that begins with its own headline would teach copying."""
    title, text, at = row["summary"], row["text"], 0
    while title and text.startswith(title, at) and len(text) - at > len(title):
        at = past(BEHIND_TITLE, text, at + len(title))
    return row | {"text": text[at:]}


# Rules for articles.


def short_body(row: Row) -> bool:
    """Under 80 Han characters: an image, a film or a page that failed to load."""
    return sum(map(len, HAN.findall(row["text"]))) < 80


def little_han(row: Row) -> bool:
    """Less than six in ten characters are Han: tables, links, code."""
    return han_share(row["text"]) < 0.6


def gambling(row: Row) -> bool:
    """Betting pages, most of them stitched from other articles to mislead search engines."""
    return n_words("gambling", row["summary"]) > 0 or n_words("gambling", row["text"]) > 2


def advert(row: Row) -> bool:
    """A shop's headline, or a body with more than one selling word in 100 characters."""
    most = max(3, len(row["text"]) / 100)
    return n_words("shop_title", row["summary"]) > 0 or n_words("advert", row["text"]) > most


def promotion(row: Row) -> bool:
    """Three or more calls to follow, scan or share."""
    return n_words("promotion", row["text"]) > 2


def forum(row: Row) -> bool:
    """The page is a forum, question, download or shop page, as its title says."""
    return n_words("forum", row["summary"]) > 0


def vulgar(row: Row) -> bool:
    """Sexual violence and the like, in the headline or three times in the body."""
    return n_words("vulgar", row["summary"]) > 0 or n_words("vulgar", row["text"]) > 2


# Rules for pairs of text and headline.
CUT_OFF = re.compile(r"^[.…]{2,}|[.…]{2,}$")
WORD = re.compile(r"[\u4e00-\u9fff0-9a-zA-Z]+")


def short_title(row: Row) -> bool:
    """Under six characters, or over 40: a section's name, or half the article."""
    return not LEAST_TITLE <= len(row["summary"]) <= 40


def title_cut_off(row: Row) -> bool:
    """The headline begins or ends in dots."""
    return bool(CUT_OFF.search(row["summary"]))


def clickbait(row: Row) -> bool:
    """The headline shouts or teases instead of telling."""
    title = row["summary"]
    shouts = title.count("!") + title.count("！") > 1
    asks = any(mark in title.partition("为什么")[2] for mark in "?？")
    return shouts or asks or n_words("shouting", title) > 0


def title_not_in_text(row: Row) -> bool:
    """Fewer than three in ten pairs of neighbouring headline characters stand in the text."""
    title = "".join(WORD.findall(row["summary"])).lower()
    text = "".join(WORD.findall(row["text"])).lower()
    pairs = [title[i : i + 2] for i in range(min(len(title) - 1, 100))]
    return sum(pair in text for pair in pairs) < 0.3 * len(pairs) or not pairs


LETTERS = re.compile(r"[^\W\d_]+")


def texts(row: Row) -> Iterator[str]:
    """Every text of a row; turns may still be malformed here."""
    if "messages" in row:
        yield from (message["content"] for message in row["messages"])
    else:
        yield from (row[key] for key in ("text", "summary") if key in row)


def _each_text(row: Row, change: Callable[[str], str]) -> Row:
    return row | {key: change(row[key]) for key in ("text", "summary") if key in row}


def _each_content(row: Row, change: Callable[[str], str]) -> Row:
    return row | {"messages": [m | {"content": change(m["content"])} for m in row["messages"]]}


# Fixes for documents and summaries.
WIDE_SPACE = re.compile("[\u00a0\u2000-\u200a\u2028\u2029\u3000\t ]+")
BLANK_LINES = re.compile(r" *\n\s*")
# Only what is written as a tag is one: a name, attributes with values, ">". So a<b and n<p stay.
TAG = re.compile(
    r"""</?(?:a|br|div|font|img|li|p|span|table|td|tr|ul)
    (?:\s+[a-z][\w:-]*+\s*+=\s*+(?:"[^"<>]*+"|'[^'<>]*+'|[^\s"'<>=`]++)|\s+nowrap)*+
    \s*+/?>""",
    re.IGNORECASE | re.VERBOSE,
)
SITE_HTML = re.compile(r"</?founder-content>|<!--.{0,80}?-->")
ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
CODE = "```"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """A changed text in which what stands between ``` is as it was."""
    parts = text.split(CODE)
    if len(parts) < 3 or len(parts) % 2 == 0:
        return change(text)
    return CODE.join(part if n % 2 else change(part) for n, part in enumerate(parts))


def normalise(row: Row) -> Row:
    """Every text takes the form that prompts have too (babyllama/rows.py)."""
    change = _each_content if "messages" in row else _each_text
    return change(row, rows.plain)


def tidy_space(row: Row) -> Row:
    """Runs of space become one space, blank lines and indents go."""

    def change(text: str) -> str:
        return BLANK_LINES.sub("\n", WIDE_SPACE.sub(" ", text))

    # U+2581 is the space of SentencePiece and would come back as one.
    return _each_text(row, lambda t: _outside_code(t.replace("\u2581", "_"), change).strip())


def unescape(text: str) -> str:
    """Entities become characters, but only those that end with a semicolon: &section= stays."""
    return ENTITY.sub(_character, text) if "&" in text else text


def _character(found: re.Match[str]) -> str:
    return html.unescape(found[0]) if found[1][0] == "#" else html5.get(f"{found[1]};", found[0])


def strip_html(row: Row) -> Row:
    """Tags go, entities become characters."""

    def change(text: str) -> str:
        return unescape(SITE_HTML.sub("", TAG.sub("", text)) if "<" in text else text)

    return _each_text(row, lambda text: _outside_code(text, change).strip())


# Behind Chinese text or a full stop; behind a Latin name [12] is an index and () a call.
REFERENCE = re.compile(
    r"(?<=[\u4e00-\u9fff。，、；：！？”’）》」』.,;:!?])(?:\[[1-9]\d{0,2}(?:-\d{1,3})?\])+"
)
EMPTY_BRACKETS = re.compile(
    r"（\s{0,9}[，,、；;：:][，,、；;：:\s]{0,20}）"
    r"|(?<![A-Za-z0-9_\])>'\"`.\s号])(?:\(\s{0,9}[，,、；;：:][，,、；;：:\s]{0,20}\)|（）|\(\))"
)
OWNER = re.compile(
    r"^(?:作者[:：]\S{1,40}|链接[:：]\s*https?://\S+|来源[:：]\s*知乎"
    r"|著作权归作者所有[^\n]{0,60}|商业转载请联系[^\n]{0,60})\s*$",
    re.MULTILINE,
)


def strip_marks(row: Row) -> Row:
    """Reference marks such as [12], brackets left empty, and doubled commas go."""

    def change(text: str) -> str:
        return EMPTY_BRACKETS.sub("", REFERENCE.sub("", text)).replace("。。", "。")

    return _each_text(row, lambda text: _outside_code(text, change))


def cut_owner(row: Row) -> Row:
    """Lines that only name the author, the link and the rights of a copied answer go."""
    return _each_text(row, lambda text: OWNER.sub("", text).strip() if "：" in text else text)


# Fixes for dialogues. Beyond `normalise`, their texts are never changed inside.
THINKING, THOUGHT = "<think>", "</think>"
PERSONA = re.compile(
    r"(?i)\W{0,9}(?:you are|you're|you will|your name|act as|assistant|a chat between|below is|meta"
    r"|你是|您是|你叫|你将|你现在|你的名字|现在你|从现在|请你?扮演|请以|请用|假设|假如|作为|扮演)"
)
LEAST_REFERENCE = 30  # characters
LEADING_SPACE = re.compile(r"\s*")


def _messages(row: Row, messages: list[dict]) -> Row:
    return row | {"messages": messages}


def strip_turns(row: Row) -> Row:
    """Space at both ends of a turn goes."""
    return _each_content(row, str.strip)


def drop_persona(row: Row) -> Row:
    """A system turn such as "you are a helpful assistant" is not reference text."""
    kept = [m for m in row["messages"] if m["role"] != "system" or _is_reference(m["content"])]
    return _messages(row, kept)


def _is_reference(text: str) -> bool:
    return len(text) >= LEAST_REFERENCE and not PERSONA.match(text)


def drop_thinking(row: Row) -> Row:
    """<think>…</think> goes from answers."""
    changed = [
        m | {"content": _without_thoughts(m["content"])} if m["role"] == "assistant" else m
        for m in row["messages"]
    ]
    return _messages(row, changed)


def _without_thoughts(text: str) -> str:
    kept, at = [], 0
    while (start := text.find(THINKING, at)) >= 0 and (end := text.find(THOUGHT, start)) >= 0:
        kept.append(text[at:start])
        at = past(LEADING_SPACE, text, end + len(THOUGHT))
    return "".join([*kept, text[at:]])


def cut_open_turn(row: Row) -> Row:
    """A last user turn that nobody answers goes."""
    messages = row["messages"]
    return _messages(
        row, messages[:-1] if messages and messages[-1]["role"] == "user" else messages
    )


TEXT_FIXES = (strip_html, normalise, tidy_space)
WEB = (*TEXT_FIXES, cut_title_tail, cut_site_text, cut_repeated_title)
DIALOGUE_FIXES = (drop_thinking, normalise, strip_turns, cut_open_turn)

FIXES: dict[str, tuple[Callable[[Row], Row], ...]] = {
    "text": (*TEXT_FIXES, strip_marks, cut_owner),
    "summary": TEXT_FIXES,
    "article": WEB,
    "headline": WEB,
    "chat": (drop_persona, *DIALOGUE_FIXES),
    "reference": DIALOGUE_FIXES,
    "exam": DIALOGUE_FIXES,
    "vqa": DIALOGUE_FIXES,
    "smalltalk": (normalise, strip_turns, cut_open_turn),
}


# Rules for all kinds.
def not_chinese(row: Row) -> bool:
    """Less than three in ten letters are Han; digits, signs and formulas do not count."""
    text = "".join(texts(row))
    n_han = len(text) - len(HAN.sub("", text))
    # Letters are looked for only where they decide.
    if n_han == 0:
        return True
    return n_han < 0.3 * len(text) and n_han < 0.3 * sum(map(len, LETTERS.findall(text)))


def empty(row: Row) -> bool:
    """A text is missing or blank."""
    return not all(text.strip() for text in texts(row))


# Rules for documents.

# At the start of a line, ??? is Markdown: a box to be opened.
GARBLED = re.compile(r"(?<=.)[?？□]{3,}|\ufffd|锟斤拷")


def short_text(row: Row) -> bool:
    """Under 20 characters: no document."""
    return len(row["text"]) < 20


def garbled(row: Row) -> bool:
    """Marks of a lost encoding, three or more in the text or one in the headline."""
    return len(GARBLED.findall(row["text"])) > 2 or bool(GARBLED.search(row.get("summary", "")))


PAIR = re.compile(r"(.)\1", re.DOTALL)
RUN = re.compile(r"([^\s.…·\-—=*_])\1{19}")


def _repeats(text: str) -> bool:
    lines = [line for line in text.split("\n") if len(line) > 5]
    if len(lines) - len(set(lines)) >= max(5, 0.1 * len(lines)):
        return True
    # A run of 20 covers two neighbours among every tenth character; few texts have such.
    return bool(PAIR.search(text[::10])) and bool(RUN.search(text))


def repetition(row: Row) -> bool:
    """Five lines and a tenth of all repeat others, or one character stands 20 times in a row."""
    return _repeats(row["text"])


# Rules for dialogues.
OWN_LABELS = re.compile(
    "|".join([*(SEPARATOR + label for label in LABELS.values()), "<eos>|</?s>"])
    + r"|\n(?:Human|Assistant) ?[:：]"
)
IDENTITY = re.compile(
    "我是.{0,8}(?:moss|belle|chatgpt|文心一言|通义千问|chatglm|deepseek|kimi)"
    "|由.{0,6}(?:openai|复旦|百度|智谱|阿里).{0,6}(?:开发|训练)",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    "(?:很抱歉|对不起|抱歉).{0,20}(?:无法|不能|没有能力)|作为(?:一个|一名)?(?:AI|人工智能|语言模型)"
)


def _answers(row: Row) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def role_label_inside(row: Row) -> bool:
    """A turn contains a label of the chat format."""
    return any(OWN_LABELS.search(SEPARATOR + text) for text in texts(row))


def other_identity(row: Row) -> bool:
    """An answer claims to be another model."""
    return any(IDENTITY.search(answer) for answer in _answers(row))


def refusal(row: Row) -> bool:
    """An answer begins with a refusal."""
    return any(REFUSAL.match(answer) for answer in _answers(row))


def looping_answer(row: Row) -> bool:
    """An answer repeats its lines, or one character 20 times in a row."""
    return any(map(_repeats, _answers(row)))


def rude(row: Row) -> bool:
    """Insults, weapons, and words of the corpus that translation has spoilt."""
    return any(n_words("rude", text) for text in texts(row))


def echo(row: Row) -> bool:
    """An answer only repeats the turn before it."""
    contents = list(texts(row))
    return any(a.strip("。.?？") == b.strip("。.?？") for a, b in itertools.pairwise(contents))


def mixed_languages(row: Row) -> bool:
    """Less than half of the characters are Han."""
    return han_share("".join(texts(row))) < 0.5


DOCUMENT = (empty, garbled, not_chinese, repetition)
ARTICLE = (*DOCUMENT, short_body, little_han, gambling, advert, forum,
           promotion, vulgar)  # fmt: skip
HEADLINE = (short_title, title_cut_off, clickbait, title_not_in_text)
DIALOGUE = (empty, role_label_inside, other_identity, refusal, not_chinese, looping_answer)

RULES: dict[str, tuple[Callable[[Row], bool], ...]] = {
    "text": (*DOCUMENT, short_text),
    "summary": (empty, not_chinese),
    "article": ARTICLE,
    "headline": (*ARTICLE, *HEADLINE),
    "chat": DIALOGUE,
    "reference": DIALOGUE,
    # Benchmarks' training parts: mostly English, asked in Chinese; short answers are no echo.
    "exam": (empty, role_label_inside, looping_answer),
    "vqa": (empty, role_label_inside, other_identity, refusal, not_chinese),
    "smalltalk": (empty, role_label_inside, mixed_languages, rude, echo),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse names that are no fix and no rule."""
    tables = (*FIXES.values(), *RULES.values())
    known = {function.__name__ for line in tables for function in line}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ConfigError(f"--skip_rules: wanted names of fixes and rules, found {unknown}; known "
                          f"are {', '.join(sorted(known))}")  # fmt: skip


def fix(row: Row, rules: str, skip: Iterable[str] = ()) -> tuple[Row, list[str]]:
    """The row after all fixes but those to skip, and the names of those that changed it."""
    changed = []
    for function in FIXES[rules]:
        if function.__name__ in skip:
            continue
        fixed = function(row)
        if fixed != row:
            changed.append(function.__name__)
        row = fixed
    return row, changed


def reason_to_drop(row: Row, rules: str, skip: Iterable[str] = ()) -> str | None:
    """The name of the first rule, but those to skip, that refuses the row, or None."""
    return next((r.__name__ for r in RULES[rules] if r.__name__ not in skip and r(row)), None)
