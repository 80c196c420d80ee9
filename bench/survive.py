"""What a translation must keep of its text: numbers, formulas, option letters, marks."""

import re
from collections import Counter

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\(([A-R])\)|^([A-R])[.)](?=\s)", re.MULTILINE)
_FORMULA = re.compile(r"\$[^$]+\$")
_COMMAND = re.compile(r"\\boxed|\\frac|<<[^>]*>>|####|Passage:|Question:|Answer:|Options:")
_HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[A-Za-z]{3,}")
_WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
    "half": "2", "dozen": "12",
}  # fmt: skip
LONGER = 4  # a translation is at most so many times as long: more is an explanation


def is_chinese(text: str) -> bool:
    """Whether a text of a mixed set (AGIEval) needs no translation."""
    return bool(_HAN.search(text))


def lost(text: str, translation: str) -> str:
    """What is wrong with a translation, in words; "" if nothing."""
    faults = []
    if not translation.strip():
        return "没有译文"
    for name, pattern in (("字母选项", _LETTER), ("公式", _FORMULA), ("标记", _COMMAND)):
        faults += _missing(name, _found(pattern, text), _found(pattern, translation))
    faults += _numbers(text, translation)
    # A name or a formula may stay as it is; a sentence may not.
    if len(_WORD.findall(_FORMULA.sub("", text))) >= 2 and not _HAN.search(translation):
        faults.append("没有译成中文")
    if len(translation) > LONGER * len(text) + 20:
        faults.append("译文过长，像是解释")
    return "；".join(faults)


def _numbers(text: str, translation: str) -> list[str]:
    """Every number must be there again; a new one only where a word said it."""
    wanted, found = (_values(t) for t in (text, translation))
    faults = _missing("数字", wanted, found)
    words = Counter(_WORDS[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _WORDS)
    new = found - wanted - words
    return faults + ([f"多出数字 {'、'.join(sorted(new))}"] if new else [])


def _values(text: str) -> Counter[str]:
    return Counter(n.replace(",", "").rstrip(".") for n in _NUMBER.findall(text))


def _found(pattern: re.Pattern[str], text: str) -> Counter[str]:
    return Counter(match.group(0).strip() for match in pattern.finditer(text))


def _missing(name: str, wanted: Counter[str], found: Counter[str]) -> list[str]:
    gone = wanted - found
    return [f"缺少{name} {'、'.join(sorted(gone))}"] if gone else []
