"""Terminal output: coloured tokens; Chinese text cut and aligned by its width."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from itertools import groupby

from rich.cells import cell_len, set_cell_size

from tokenizer import Tokenizer

BOLD, DIM, GREEN, RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[0m"


def painter_of(tokenizer: Tokenizer | None) -> "Painter":
    """For standard output: colours on a terminal only, and none where NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    columns = shutil.get_terminal_size((100, 24)).columns
    return Painter(tokenizer, sys.stdout.isatty() and not plain, max(40, columns))


class Painter:
    """Turns rows and tokens into what a terminal shows."""

    def __init__(self, tokenizer: Tokenizer | None, colours: bool, width: int) -> None:
        self.tokenizer, self.colours, self.width = tokenizer, colours, width

    def ink(self, style: str, text: str) -> str:
        return f"{style}{text}{RESET}" if self.colours and style and text else text

    def parts(self, ids: Sequence[int]) -> list[str]:
        """The characters that each token completes; control tokens by name."""
        assert self.tokenizer  # a painter of tokens has one
        names = {self.tokenizer.bos_id: "<bos>", self.tokenizer.eos_id: "<eos>"}
        decode = self.tokenizer.stream_decoder()
        return [
            visible(decode(token)) if self.tokenizer.n_bytes([token])
            else names.get(token, f"<{token}>")
            for token in ids
        ]  # fmt: skip

    def dialogue(self, read: tuple[list[int], list[int]]) -> str:
        """The text of (ids, mask), what is learnt marked."""
        runs = []
        for is_learnt, run_of in groupby(zip(*read, strict=True), key=lambda pair: pair[1]):
            text = "".join(self.parts([token for token, _ in run_of]))
            text = self.ink(GREEN if is_learnt else "", text)
            runs.append(f"⟦{text}⟧" if is_learnt and not self.colours else text)
        return "".join(runs)


def visible(text: str) -> str:
    """Control and invisible characters spelled out: a row must not steer the terminal."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in "\n\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
        else c
        for c in text
    )


def clipped(text: str, width: int) -> str:
    """As much of a text as fits into so many columns."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
