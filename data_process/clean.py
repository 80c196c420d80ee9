"""Cleaning of rows between reading and writing: first fixes, then rules.

A fix (FIX) changes a row, a rule (RULE) says that it must go; words.yaml says which are in each way
of cleaning, usually named after the kind of the rows, and holds the lists of words. The name of a
fix or a rule is the one under which it is counted, and by which --skip_rules switches it off.
Duplicates belong to dedup.py.
"""

import functools
import html
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from html.entities import html5
from pathlib import Path

import yaml

from babyllama.errors import ConfigError
from babyllama.language import letters
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
def _read(part: str) -> dict:
    """A part of words.yaml."""
    return yaml.safe_load(WORDS.read_text("utf-8"))[part]


@functools.cache
def _words(name: str, within: str = "{}") -> re.Pattern[str]:
    """Any word of a list in words.yaml, inside a larger pattern."""
    return re.compile(within.replace("{}", "|".join(_read("words")[name])))


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(_read("patterns")[name])


def _without(name: str, text: str) -> str:
    """A text from which what a pattern of words.yaml matches is gone."""
    return _pattern(name).sub("", text)


def ways() -> dict[str, dict[str, list[str]]]:
    """The fixes and rules of each way of cleaning, in their order."""
    return _read("ways")


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
LEAST_TITLE = 6

LOST_SPACES = re.compile(r"(?:\?[ \n]+)+\?|^\?+|\? *$")
TAIL_REACH = 300  # a tail starts this near the end; further inside it may be part of the story


def cut_title_tail(row: Row) -> Row:
    """Site names, key words and labels round a headline go, if a headline is left.

    The name of a forum stays: the rule `forum` drops the row by it.
    """
    title = row["summary"].replace("\n", " ")
    if n_words("forum", title):
        return row | {"summary": title}
    label = _pattern("title_label")
    for pattern in (*TITLE_TAILS, label, label):
        shorter = pattern.sub("", title, count=1).rstrip()
        if len(shorter) >= LEAST_TITLE:
            title = shorter
    return row | {"summary": title.strip()}


def cut_site_text(row: Row) -> Row:
    """ "Tap above to follow us", disclaimers, editors and the like go from both ends."""
    text = LOST_SPACES.sub("", row["text"]) if "?" in row["text"] else row["text"]
    text = text[past(_words("site_head", r"(?:{})\s*"), text) :]
    start = max(len(text) - TAIL_REACH, 0)
    tail = _words("site_tail", r"(?s)\s*(?:{}).*$").sub("", text[start:]).rstrip()
    tail = _words("credit", r"\s*[(（【]?(?:{})[:：｜|].{0,40}$").sub("", tail)
    return row | {"text": (text[:start] + tail).strip()}


BEHIND_TITLE = re.compile(r"[ \n:：,，。!！?？…]*")


def cut_repeated_title(row: Row) -> Row:
    """A body that begins with its own headline would teach copying."""
    title, text, at = row["summary"], row["text"], 0
    while title and text.startswith(title, at) and len(text) - at > len(title):
        at = past(BEHIND_TITLE, text, at + len(title))
    return row | {"text": text[at:]}


def texts(row: Row) -> Iterator[str]:
    """Every text of a row; turns may still be malformed here."""
    if "messages" in row:
        yield from (message["content"] for message in row["messages"])
    else:
        yield from (row[key] for key in ("text", "summary") if key in row)


def _each(row: Row, change: Callable[[str], str]) -> Row:
    """A row with each of its texts changed."""
    if "messages" in row:
        return row | {"messages": [m | {"content": change(m["content"])} for m in row["messages"]]}
    return row | {key: change(row[key]) for key in ("text", "summary") if key in row}


# Fixes for documents and summaries.
WIDE_SPACE = re.compile("[\u00a0\u2000-\u200a\u2028\u2029\u3000\t ]+")
BLANK_LINES = re.compile(r" *\n\s*")
SITE_HTML = re.compile(r"</?founder-content>|<!--.{0,80}?-->")
ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
CODE = "```"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """A changed text in which what stands between ``` is as it was."""
    parts = text.split(CODE)
    if len(parts) < 3 or len(parts) % 2 == 0:
        return change(text)
    return CODE.join(part if n % 2 else change(part) for n, part in enumerate(parts))


def _prose(row: Row, change: Callable[[str], str]) -> Row:
    return _each(row, lambda text: _outside_code(text, change))


def unescape(text: str) -> str:
    """Entities become characters, but only those that end with a semicolon: &section= stays."""
    return ENTITY.sub(_character, text) if "&" in text else text


def _character(found: re.Match[str]) -> str:
    return html.unescape(found[0]) if found[1][0] == "#" else html5.get(f"{found[1]};", found[0])


def _without_html(text: str) -> str:
    return unescape(SITE_HTML.sub("", _without("tag", text)) if "<" in text else text)


def _tidied(text: str) -> str:
    return BLANK_LINES.sub("\n", WIDE_SPACE.sub(" ", text))


def _without_marks(text: str) -> str:
    return _without("empty_brackets", _without("reference", text)).replace("。。", "。")


# Fixes for dialogues. Beyond `normalise`, their texts are never changed inside.
THINKING, THOUGHT = "<think>", "</think>"
LEAST_REFERENCE = 30  # characters
LEADING_SPACE = re.compile(r"\s*")


def drop_persona(row: Row) -> Row:
    return row | {"messages": [
        m for m in row["messages"]
        if m["role"] != "system"
        or (len(m["content"]) >= LEAST_REFERENCE and not _pattern("persona").match(m["content"]))
    ]}  # fmt: skip


def drop_thinking(row: Row) -> Row:
    return row | {"messages": [
        m | {"content": _without_thoughts(m["content"])} if m["role"] == "assistant" else m
        for m in row["messages"]
    ]}  # fmt: skip


def _without_thoughts(text: str) -> str:
    kept, at = [], 0
    while (start := text.find(THINKING, at)) >= 0 and (end := text.find(THOUGHT, start)) >= 0:
        kept.append(text[at:start])
        at = past(LEADING_SPACE, text, end + len(THOUGHT))
    return "".join([*kept, text[at:]])


def cut_open_turn(row: Row) -> Row:
    *turns, last = row["messages"] or [{"role": ""}]
    return row | {"messages": turns} if last["role"] == "user" else row


FIX: dict[str, Callable[[Row], Row]] = {
    # Tags go, entities become characters.
    "strip_html": lambda row: _each(_prose(row, _without_html), str.strip),
    # Every text takes the form that prompts have too.
    "normalise": lambda row: _each(row, letters.plain),
    # Runs of space become one, blank lines and indents go; U+2581 is the space of SentencePiece and
    # would come back as one.
    "tidy_space": lambda row: _each(
        _prose(_each(row, lambda text: text.replace("\u2581", "_")), _tidied), str.strip
    ),
    # Reference marks such as [12], brackets left empty, and doubled commas go.
    "strip_marks": lambda row: _prose(row, _without_marks),
    # Lines that only name the author, the link and the rights of a copied answer go.
    "cut_owner": lambda row: _each(row, lambda t: _without("owner", t).strip() if "：" in t else t),
    "cut_title_tail": cut_title_tail,
    "cut_site_text": cut_site_text,
    "cut_repeated_title": cut_repeated_title,
    # A system turn such as "you are a helpful assistant" is not reference text.
    "drop_persona": drop_persona,
    # <think>…</think> goes from answers.
    "drop_thinking": drop_thinking,
    "strip_turns": lambda row: _each(row, str.strip),
    # A last user turn that nobody answers goes.
    "cut_open_turn": cut_open_turn,
}

# Rules.
LETTERS = re.compile(r"[^\W\d_]+")
CUT_OFF = re.compile(r"^[.…]{2,}|[.…]{2,}$")
WORD = re.compile(r"[\u4e00-\u9fff0-9a-zA-Z]+")
# At the start of a line, ??? is Markdown: a box to be opened.
GARBLED = re.compile(r"(?<=.)[?？□]{3,}|\ufffd|锟斤拷")
PAIR = re.compile(r"(.)\1", re.DOTALL)
RUN = re.compile(r"([^\s.…·\-—=*_])\1{19}")
OWN_LABELS = re.compile(
    "|".join([*(SEPARATOR + label for label in LABELS.values()), "<eos>|</?s>"])
    + r"|\n(?:Human|Assistant) ?[:：]"
)


def _n_han(text: str) -> int:
    return len(text) - len(HAN.sub("", text))


def _is_foreign(text: str) -> bool:
    # Letters are looked for only where they decide.
    least, n_han = 0.3, _n_han(text)
    return not n_han or (
        n_han < least * len(text) and n_han < least * sum(map(len, LETTERS.findall(text)))
    )


def _shouts(title: str) -> bool:
    asks = any(mark in title.partition("为什么")[2] for mark in "?？")
    return asks or title.count("!") + title.count("！") > 1 or n_words("shouting", title) > 0


def _is_strange(title: str, text: str) -> bool:
    title, text = ("".join(WORD.findall(part)).lower() for part in (title, text))
    pairs = [title[i : i + 2] for i in range(min(len(title) - 1, 100))]
    return sum(pair in text for pair in pairs) < 0.3 * len(pairs) or not pairs


def _repeats(text: str) -> bool:
    lines = [line for line in text.split("\n") if len(line) > 5]
    if len(lines) - len(set(lines)) >= max(5, 0.1 * len(lines)):
        return True
    # A run of 20 covers two neighbours among every tenth character; few texts have such.
    return bool(PAIR.search(text[::10])) and bool(RUN.search(text))


def _answers(row: Row) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def _says(name: str, row: Row, most: int = 0) -> bool:
    """Words of a list stand in a headline, or more than `most` times in the body below it."""
    return n_words(name, row["summary"]) > 0 or n_words(name, row["text"]) > most


RULE: dict[str, Callable[[Row], bool]] = {
    # A text is missing or blank.
    "empty": lambda row: not all(text.strip() for text in texts(row)),
    # Less than three in ten letters are Han; digits, signs and formulas do not count.
    "not_chinese": lambda row: _is_foreign("".join(texts(row))),
    # Marks of a lost encoding, three or more in the text or one in the headline.
    "garbled": lambda row: (
        len(GARBLED.findall(row["text"])) > 2 or bool(GARBLED.search(row.get("summary", "")))
    ),
    # Five lines and a tenth of all repeat others, or one character stands 20 times in a row.
    "repetition": lambda row: _repeats(row["text"]),
    "short_text": lambda row: len(row["text"]) < 20,
    # Under 80 Han characters: an image, a film or a page that failed to load.
    "short_body": lambda row: _n_han(row["text"]) < 80,
    # Tables, links, code.
    "little_han": lambda row: han_share(row["text"]) < 0.6,
    # Betting pages, most of them stitched from other articles to mislead search engines.
    "gambling": lambda row: _says("gambling", row, 2),
    # A shop's headline, or a body with more than one selling word in 100 characters.
    "advert": lambda row: (
        n_words("shop_title", row["summary"]) > 0
        or n_words("advert", row["text"]) > max(3, len(row["text"]) / 100)
    ),
    "promotion": lambda row: n_words("promotion", row["text"]) > 2,
    "forum": lambda row: n_words("forum", row["summary"]) > 0,
    "vulgar": lambda row: _says("vulgar", row, 2),
    # A section's name, or half the article.
    "short_title": lambda row: not LEAST_TITLE <= len(row["summary"]) <= 40,
    "title_cut_off": lambda row: bool(CUT_OFF.search(row["summary"])),
    # The headline shouts or teases instead of telling.
    "clickbait": lambda row: _shouts(row["summary"]),
    # Fewer than three in ten pairs of neighbouring headline characters stand in the text.
    "title_not_in_text": lambda row: _is_strange(row["summary"], row["text"]),
    # A turn contains a label of the chat format.
    "role_label_inside": lambda row: any(OWN_LABELS.search(SEPARATOR + t) for t in texts(row)),
    # An answer claims to be another model.
    "other_identity": lambda row: any(n_words("other_identity", a) for a in _answers(row)),
    # An answer begins with a refusal.
    "refusal": lambda row: any(n_words("refusal", a) for a in _answers(row)),
    "looping_answer": lambda row: any(map(_repeats, _answers(row))),
    # Insults, weapons, and words of the corpus that translation has spoilt.
    "rude": lambda row: any(n_words("rude", text) for text in texts(row)),
    # A turn only repeats the one before it.
    "echo": lambda row: any(
        a.strip("。.?？") == b.strip("。.?？") for a, b in itertools.pairwise(texts(row))
    ),
    "mixed_languages": lambda row: han_share("".join(texts(row))) < 0.5,
}


def check_names(names: Iterable[str]) -> None:
    """Refuse names that are no fix and no rule."""
    known = {*FIX, *RULE}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ConfigError(f"--skip_rules: wanted names of fixes and rules, found {unknown}; known "
                          f"are {', '.join(sorted(known))}")  # fmt: skip


def fix(row: Row, rules: str, skip: Iterable[str] = ()) -> tuple[Row, list[str]]:
    """The row after all fixes but those to skip, and the names of those that changed it."""
    changed = []
    for name in ways()[rules]["fixes"]:
        if name not in skip and (fixed := FIX[name](row)) != row:
            changed.append(name)
            row = fixed
    return row, changed


def reason_to_drop(row: Row, rules: str, skip: Iterable[str] = ()) -> str | None:
    """The name of the first rule, but those to skip, that refuses the row, or None."""
    return next((r for r in ways()[rules]["rules"] if r not in skip and RULE[r](row)), None)
