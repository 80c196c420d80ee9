"""The terminal: colours, text that cannot harm it, lines with history and completion.

Line editing is Python's readline (GNU readline or libedit); Windows has none, there the console's
own editing works, with its history of one session and without completion. Colours keep to
no-color.org and are left out where output is no terminal, on Windows too.
"""

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

MORE = "…… "  # the prompt of a message's further lines
BLOCK = '"""'
MOST_REMEMBERED = 1000  # messages
LONGEST_REMEMBERED = 2000  # characters

# Control characters, and marks that turn the direction of what follows (U+202E and its like).
HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def paint(text: str, code: str = "2", file: TextIO | None = None) -> str:
    """Colour (dim unless told) where the terminal has it and the user wants it.

    file: where the text will go; if absent standard output
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    plain = plain or not text or not (file or sys.stdout).isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def visible(text: str, file: TextIO | None = None) -> str:
    """Text that cannot move the cursor, ring the bell or turn the line round on a terminal.

    Where output goes elsewhere it stays as it is; file as for `paint`.
    """
    return HARMFUL.sub("·", text) if (file or sys.stdout).isatty() else text


def whole(text: str) -> str:
    """Text that can be encoded: half characters from a broken terminal become "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def say(text: str, code: str = "2") -> None:
    """Show a note of ours, which may quote anything."""
    print(paint(visible(text), code))


def state_dir() -> Path:
    """Where programs keep what they remember of a user: the XDG state directory, or its like."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "babyllama"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "babyllama"


class Lines:
    """Reads messages: edited, remembered, completed, of one line or many."""

    def __init__(self, complete: Callable[[str, str], list[str]], history: Path) -> None:
        """complete: takes the line up to the word at the cursor, and that word; gives the words
        it may become"""
        self.history = history
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 must not end us
        try:
            import readline
        except ImportError:
            self.readline = None
            return
        self.readline = readline
        readline.set_auto_history(False)
        readline.set_completer_delims(" ")

        def words(word: str, number: int) -> str | None:
            before = readline.get_line_buffer()[: readline.get_begidx()]
            found = complete(before, word)
            if len(found) == 1 and not found[0].endswith("/"):
                found = [found[0] + " "]  # readline itself is told by Python to add nothing
            return [*found, None][number]

        readline.set_completer(words)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if not is_libedit:  # pasted lines are one message; Python switches it off
            readline.parse_and_bind("set enable-bracketed-paste on")
        for message in _remembered(history)[-MOST_REMEMBERED:]:
            readline.add_history(message)

    def so_far(self) -> str:
        """What stands in the line being edited."""
        return self.readline.get_line_buffer() if self.readline else ""

    def read(self, prompt: str) -> str:
        """The next message. A line that ends in "\\" goes on in the next one; a message that
        begins with three quotes goes on until three quotes end a line.

        raises: EOFError, KeyboardInterrupt
        """
        line = input(prompt)
        if line.lstrip().startswith(BLOCK):
            line = line.lstrip()[len(BLOCK) :]
            while not line.rstrip().endswith(BLOCK):
                line += "\n" + input(MORE)
            line = line.rstrip()[: -len(BLOCK)].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(MORE)
        self._remember(line)
        return line

    def paste(self) -> str:
        """A text of any number of lines, blank ones too: it ends where no more is waiting.

        A terminal with bracketed paste hands it over as one line, others line by line at once.
        raises: EOFError, KeyboardInterrupt
        """
        lines = [input()]
        while _is_waiting():
            lines.append(input())
        return "\n".join(lines)

    def _remember(self, message: str) -> None:
        is_short = len(message) <= LONGEST_REMEMBERED and "\0" not in message
        if not self.readline or not message.strip() or not is_short:
            return
        n = self.readline.get_current_history_length()
        if n and self.readline.get_history_item(n) == message:
            return
        self.readline.add_history(message)
        with suppress(OSError):  # a home that cannot be written to: the session's history remains
            self.history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(file, "a", encoding="ascii") as opened:
                opened.write(json.dumps(message) + "\n")


def _is_waiting(pause_s: float = 0.2) -> bool:
    """True if something is typed or pasted already, or is within `pause_s`."""
    if sys.platform == "win32":
        import msvcrt

        time.sleep(pause_s)
        return msvcrt.kbhit()
    return bool(select.select([sys.stdin], [], [], pause_s)[0])


def _remembered(path: Path) -> list[str]:
    """The messages of former sessions; lines that are none are left out."""
    found = []
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text("ascii").splitlines():
            with suppress(ValueError, RecursionError):
                message = json.loads(line)
                if isinstance(message, str) and "\0" not in message:
                    found.append(message)
    return found
