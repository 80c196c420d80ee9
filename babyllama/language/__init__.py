"""Messages in the user's language: English in the code, Chinese in zh.po, matched at the door.

The code says what it says in plain English f-strings. Where the environment is Chinese, or with
`--lang zh`, `speak` puts a Door before standard output and standard error, and each text that is
printed is looked up there: a message of the catalogue (the form of GNU gettext, with {} for what
is filled in) gives its Chinese with what was filled in, which may hold messages itself. What is no
message passes as it is, and so do JSON and what a model says (`verbatim`); files and the server's
API never come by here. tests/test_language.py finds what the catalogue lacks.
"""

import io
import json
import locale
import os
import re
import sys
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, TextIO

from jsonargparse import DefaultHelpFormatter
from rich.cells import cell_len

LANGUAGES = ("en", "zh")
CATALOGUE = Path(__file__).with_name("zh.po")

# A message that begins or ends so is part of a longer one: "; did you mean {}?".
OPEN = (" ", ",", ";", ":", "(")
SEPARATORS = {"; ": "；", ", ": "，", ": ": "："}
MARGIN = r"(?:\s|\x1b\[[\d;]*m)*"
COMMANDS = (" ", "python")  # so begins a docstring's paragraph of them
REMARK = re.compile(r"(?<=\S)(  +(?:# )?)(\S.*)")  # behind a command


def speak(argv: Sequence[str]) -> list[str]:
    """Let this program speak UTF-8, and Chinese where it should; returns the command line without
    --lang."""
    sys.stdout, sys.stderr = verbatim(sys.stdout), verbatim(sys.stderr)
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lang", nargs="?", const="")
    known, rest = parser.parse_known_args(argv)
    asked = known.lang
    if asked not in (*LANGUAGES, None):
        return [*rest, f"--lang={asked}"]  # for the parser to refuse
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console may speak GBK
            stream.reconfigure(encoding="utf-8", errors="replace")
    if is_chinese(os.environ) if asked is None else asked == "zh":
        sys.stdout, sys.stderr = Door(sys.stdout, _chinese()), Door(sys.stderr, _chinese())
    return rest


def is_chinese(environment: Mapping[str, str]) -> bool:
    """True if messages are wanted in Chinese, by the first of these that is set; Windows sets
    none, and there Python knows."""
    names = [environment.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    known = next(filter(None, names), locale.setlocale(locale.LC_CTYPE))
    return known.startswith(("zh", "Chinese"))


@cache
def _chinese() -> "Catalogue":
    return Catalogue(read_catalogue(CATALOGUE))


def read_catalogue(path: Path) -> dict[str, str]:
    """Messages and their translations."""
    quoted = r'(".*"(?:\n".*")*)'
    pairs = re.findall(rf"^msgid {quoted}\nmsgstr {quoted}", path.read_text("utf-8"), re.M)
    return {_unquoted(key): _unquoted(translation) for key, translation in pairs}


def _unquoted(lines: str) -> str:
    return "".join(map(json.loads, lines.splitlines()))


@dataclass(frozen=True)
class Message:
    """A message cut at what is filled in, and its translation."""

    pieces: tuple[str, ...]
    translation: str
    is_open: tuple[bool, bool]  # something may stand before it, behind it

    def filled_in(self, text: str) -> list[str] | None:
        """What is filled in, if `text` is this message; lines only where it says so, or last."""
        first, *middle, last = self.pieces
        if not (text.startswith(first) and text.endswith(last)):
            return None
        found, at, end = [], len(first), len(text) - len(last)
        for piece in middle:
            there = text.find(piece, at, end)
            if there < 0:
                return None
            found.append(text[at:there])
            at = there + len(piece)
        if "\n" in "".join(found) and "\n" not in "".join(self.pieces):
            return None
        return [*found, text[at:end]] if at <= end else None


class Catalogue:
    """Translates texts, the most specific message first."""

    def __init__(self, entries: dict[str, str]) -> None:
        self.exact, messages = {}, []
        for key, translation in entries.items():
            pieces = [""]
            for literal, field, *_ in Formatter().parse(key):
                pieces[-1] += literal
                pieces += [""] * (field is not None)
            if len(pieces) == 1:
                self.exact[pieces[0]] = translation.format()
            is_open = key.startswith(OPEN), key.endswith(OPEN)
            if any(is_open) or len(pieces) > 1:
                pieces = [""] * is_open[0] + pieces + [""] * is_open[1]
                messages.append(Message(tuple(pieces), translation, is_open))
        # Of two that fit the more specific one, but what stands before a message goes first.
        self.messages = sorted(
            messages, key=lambda one: (": " not in one.pieces[0], -len("".join(one.pieces)))
        )

    def say(self, text: str, is_part: bool = False) -> str:
        """A text in Chinese as far as it is known; a part of one may be several."""
        if text in self.exact and (" " in text or not is_part):  # a lone word may be a name
            return self.exact[text]
        if not re.search("[A-Za-z]{2}", text):
            return text
        for message in self.messages:
            if (is_part or not any(message.is_open)) and (found := message.filled_in(text)):
                filled = [self.say(part, is_part=True) for part in found]
                head = filled.pop(0) if message.is_open[0] else ""
                tail = filled.pop() if message.is_open[1] else ""
                return head + message.translation.format(*filled) + tail
        if "\n" in text:
            alone = [(line, self.printed(line)) for line in text.split("\n")]
            return "\n".join(s if s != line else self.printed(s, is_part) for line, s in alone)
        if "  " in text:  # cells of a table
            first, *others = re.split("(  +)", text)
            said = self.say(first, is_part)
            room = cell_len(first) - cell_len(said)
            for gap, cell in zip(others[::2], others[1::2], strict=True):
                new = self.say(cell, is_part)
                room += len(gap) + cell_len(cell) - cell_len(new)
                said, room = said + " " * max(1, room) + new, 0
            return said
        for separator, wide in SEPARATORS.items() if is_part else ():
            if separator in text:
                parts = text.split(separator)
                news = [self.say(part, is_part) for part in parts]
                return wide.join(news) if news != parts else text
        return text

    def printed(self, text: str, is_part: bool = False) -> str:
        """What is printed at once: a message between blanks and colours, or a progress bar."""
        if text.startswith(("{", "[{", '["')):  # JSON
            return text
        if text.startswith("\r"):
            name, colon, rest = text.partition(": ")
            rest = re.sub(r" ?[a-z]+(?=/s|\])", lambda unit: self.exact.get(unit[0], unit[0]), rest)
            return "\r" + self.say(name[1:]) + colon + rest
        parts = re.fullmatch(rf"({MARGIN})(.*?)({MARGIN})", text, re.S)
        assert parts  # every text has this form
        return parts[1] + self.say(parts[2], is_part) + parts[3]

    def paragraphs(self, text: str) -> str:
        """A docstring: whole paragraphs, and of indented lines what is said behind a command."""
        said = []
        for paragraph in text.strip().split("\n\n"):
            if paragraph.startswith(COMMANDS):
                said.append(REMARK.sub(lambda found: found[1] + self.say(found[2]), paragraph))
            else:
                said.append("\n".join(wrapped(self.say(" ".join(paragraph.split())), 100)))
        return "\n\n".join(said)


class Door:
    """A stream that says what is written to it in Chinese."""

    def __init__(self, stream: TextIO, found: Catalogue) -> None:
        self.plain, self.catalogue = stream, found

    def write(self, text: str) -> int:
        return self.plain.write(self.catalogue.printed(text))

    def __getattr__(self, name: str) -> object:
        return getattr(self.plain, name)


def verbatim(stream: TextIO) -> TextIO:
    """A stream for words that are not ours: a model's, a row's."""
    return stream.plain if isinstance(stream, Door) else stream


def catalogue() -> Catalogue | None:
    """What this program translates with; None where it speaks English."""
    return sys.stderr.catalogue if isinstance(sys.stderr, Door) else None


def say(text: str) -> str:
    """A message of ours in the user's language, where it must be known before it is printed."""
    found = catalogue()
    return found.say(text) if found else text


def wrapped(text: str, width: int) -> list[str]:
    """Lines of Chinese, which breaks at every character but where punctuation holds on to it."""
    lines = [""]
    for unit in re.findall(r"[（《“]*(?:[!-~]+|.)[，。；：、！？）》”]* *", text):
        if cell_len(lines[-1] + unit.rstrip()) > width:
            lines.append("")
        lines[-1] += unit
    return [line.rstrip() for line in lines]


class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the script's docstring as it is written, and all in the user's language."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, say("usage: ") if prefix is None else prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and say(heading))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(say(text), width, indent)

    def _expand_help(self, action: Action) -> str:
        return say(" ".join(super()._expand_help(action).split()))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width) if catalogue() else super()._split_lines(text, width)
