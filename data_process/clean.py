"""What happens to a row between reading and writing: first fixes, then rules.

A fix changes a row (FIXES), a rule says that a row must go (RULES); both tables have one line
for each way of cleaning, usually named after the kind of the rows. The name of a function is
the name under which it is counted, and by which --skip_rules switches it off. What only web sites
need is in clean_web.py; duplicates belong to dedup.py.
"""

import functools
import html
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from babyllama.errors import ConfigError, DataError
from data_process import clean_web as web
from data_process.han import HAN, han_share
from tokenizer import LABELS, SEPARATOR

Row = dict
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

INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b-\u200f\u2060\ufeff\ue000-\uf8ff]")
WIDE_SPACE = re.compile("[\u00a0\u2000-\u200a\u2028\u2029\u3000\t ]+")
BLANK_LINES = re.compile(r" *\n\s*")
TAG = re.compile(r"</?(?:a|br|div|font|img|li|p|span|table|td|tr|ul)\b[^<>]*>", re.IGNORECASE)
SITE_HTML = re.compile(r"</?founder-content>|<!--.{0,80}?-->")


def tidy_characters(row: Row) -> Row:
    """Zero-width, control and private-use characters go; runs of space become one space."""

    def change(text: str) -> str:
        # U+2581 is the space of SentencePiece and would come back as one.
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2581", "_")
        text = WIDE_SPACE.sub(" ", INVISIBLE.sub("", text))
        return BLANK_LINES.sub("\n", text).strip()

    return _each_text(row, change)


def strip_html(row: Row) -> Row:
    """Entities become characters, tags go."""

    def change(text: str) -> str:
        if "&" in text:
            text = html.unescape(text)
        return SITE_HTML.sub("", TAG.sub("", text)).strip() if "<" in text else text

    return _each_text(row, change)


# Full-width letters and digits; Chinese punctuation stays as wide as it is.
WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]")
REFERENCE = re.compile(r"\[\d{1,3}(?:-\d{1,3})?\]")
EMPTY_BRACKETS = re.compile(r"[（(][，,、；;：:\s]*[）)]|《》|「」")
OWNER = re.compile(
    r"^(?:作者[:：]\S{1,40}|链接[:：]\s*https?://\S+|来源[:：]\s*知乎"
    r"|著作权归作者所有[^\n]{0,60}|商业转载请联系[^\n]{0,60})\s*$",
    re.MULTILINE,
)


def compose(row: Row) -> Row:
    """Letters with separate accents become one character (Unicode NFC)."""
    return _each_text(row, lambda text: unicodedata.normalize("NFC", text))


def narrow(row: Row) -> Row:
    """Full-width letters and digits become plain ones."""
    return _each_text(row, lambda text: WIDE.sub(lambda found: chr(ord(found[0]) - 0xFEE0), text))


def strip_marks(row: Row) -> Row:
    """Reference marks such as [12], brackets left empty, and doubled commas go."""

    def change(text: str) -> str:
        return EMPTY_BRACKETS.sub("", REFERENCE.sub("", text)).replace("。。", "。")

    return _each_text(row, change)


def cut_owner(row: Row) -> Row:
    """Lines that only name the author, the link and the rights of a copied answer go."""
    return _each_text(row, lambda text: OWNER.sub("", text).strip() if "：" in text else text)


# Frequent characters whose simplified form differs: one in a hundred marks a traditional text.
TRADITIONAL = re.compile(
    "[國們這來時說對為會學過個後開關還點長實現發經濟產業義從兩員將應該給讓問題報導記體機構區場設處車輛傳據]"
)


@functools.cache
def _converter() -> Callable[[str], str]:
    try:
        import opencc
    except ImportError:
        raise DataError("wanted OpenCC to simplify traditional characters, found it not installed; "
                        "pip install -r requirements.txt") from None  # fmt: skip
    return opencc.OpenCC("t2s").convert


def _simplify(text: str) -> str:
    is_traditional = len(TRADITIONAL.findall(text)) > 0.01 * len(text)
    return _converter()(text) if is_traditional else text


def simplify(row: Row) -> Row:
    """Texts in traditional characters become simplified ones (OpenCC, t2s)."""
    return (_each_content if "messages" in row else _each_text)(row, _simplify)


# Fixes for dialogues. Beyond `simplify`, their texts are never changed inside.

THINK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def _messages(row: Row, messages: list[dict]) -> Row:
    return row | {"messages": messages}


def strip_turns(row: Row) -> Row:
    """Space at both ends of a turn goes."""
    return _each_content(row, str.strip)


def drop_persona(row: Row) -> Row:
    """A system turn such as "you are a helpful assistant" is not reference text."""
    return _messages(row, [m for m in row["messages"] if m["role"] != "system"])


def drop_thinking(row: Row) -> Row:
    """<think>…</think> goes from answers."""
    changed = [
        m | {"content": THINK.sub("", m["content"])} if m["role"] == "assistant" else m
        for m in row["messages"]
    ]
    return _messages(row, changed)


def cut_open_turn(row: Row) -> Row:
    """A last user turn that nobody answers goes."""
    messages = row["messages"]
    return _messages(
        row, messages[:-1] if messages and messages[-1]["role"] == "user" else messages
    )


WEB = (tidy_characters, strip_html, web.cut_title_tail, web.cut_site_text, web.cut_repeated_title)
DOCUMENT_FIXES = (compose, tidy_characters, strip_html, narrow, simplify, strip_marks, cut_owner)
DIALOGUE_FIXES = (drop_thinking, simplify, strip_turns, cut_open_turn)

FIXES: dict[str, tuple[Callable[[Row], Row], ...]] = {
    "text": DOCUMENT_FIXES,
    "summary": (tidy_characters, strip_html, simplify),
    "article": WEB,
    "headline": WEB,
    "chat": (drop_persona, *DIALOGUE_FIXES),
    "reference": DIALOGUE_FIXES,
    "exam": DIALOGUE_FIXES,
    "vqa": DIALOGUE_FIXES,
    "smalltalk": (strip_turns, cut_open_turn),
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


def traditional(row: Row) -> bool:
    """One in fifty characters is a traditional form; the project's text is simplified."""
    return len(TRADITIONAL.findall(row["text"])) > 0.02 * len(row["text"])


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
RUDE = re.compile(
    "脑残|蠢|瘾君子|酒鬼|骗子|懦夫|交配|屁股|卫生巾|杀人|精神分裂|偏执|希望你死|应该死|驴|枪|婆娘|弯腰|克隆"
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
    return any(map(RUDE.search, texts(row)))


def echo(row: Row) -> bool:
    """An answer only repeats the turn before it."""
    contents = list(texts(row))
    return any(a.strip("。.?？") == b.strip("。.?？") for a, b in itertools.pairwise(contents))


def mixed_languages(row: Row) -> bool:
    """Less than half of the characters are Han."""
    return han_share("".join(texts(row))) < 0.5


DOCUMENT = (empty, garbled, not_chinese, traditional, repetition)
ARTICLE = (*DOCUMENT, web.short_body, web.little_han, web.gambling, web.advert, web.forum,
           web.promotion, web.vulgar)  # fmt: skip
HEADLINE = (web.short_title, web.title_cut_off, web.clickbait, web.title_not_in_text)
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
