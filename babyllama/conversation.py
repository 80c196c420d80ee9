"""What was said, and what of it the model still sees; which checkpoint is talked to.

The chat format is the tokenizer's. Nothing here prints.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from babyllama.checkpoint_files import newest_run
from babyllama.cli import REPO, from_repo
from babyllama.errors import ConfigError, DataError
from babyllama.passages import trim
from tokenizer import Tokenizer

MOST_CHARACTERS = 100_000  # read from a reference file; far more than any context holds


@dataclass
class Conversation:
    """What was said so far, and how much of it the model still sees.

    room: tokens a prompt may take; a quarter of the context, or less, is kept for the reply
    first: the turns before this one no longer fit; they stay in `turns` for saving
    """

    tokenizer: Tokenizer
    room: int
    reference: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    first: int = 0

    def messages(self, first: int = 0, found: str = "") -> list[dict]:
        """The 资料, if there is one, and the turns from `first` on.

        found: stands in for the 资料 where there is none
        """
        reference = self.reference or found
        messages = [{"role": "system", "content": reference}] if reference else []
        for user, assistant in self.turns[first:]:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return messages

    def prompt_for(self, question: str, found: str = "") -> list[int]:
        """The ids to continue; whole oldest turns are let go until they fit, never the 资料.

        found: 资料 for this question alone
        raises: ConfigError if the question does not fit even alone; nothing is let go then
        """
        for first in range(self.first, len(self.turns) + 1):
            asked = [*self.messages(first, found), {"role": "user", "content": question}]
            ids = self.tokenizer.render_prompt(asked)
            if len(ids) <= self.room:
                self.first = first
                return ids
        raise ConfigError(
            f"这条消息太长：连同资料共 {len(ids)} 个 token，上限 {self.room}；请缩短消息或资料"
        )

    def reference_room(self, question: str) -> int:
        """The tokens that passages found for a question may take: at most half of all, so that
        the last turns stay too, and never so many that the question does not fit."""
        alone = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
        left = self.room - len(self.tokenizer.render_prompt(alone))
        return max(min(self.room // 2, left - 4), 0)  # pieces are encoded apart: a few ids more

    def n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def set_reference(self, text: str) -> str:
        """Make `text` the 资料; returns what there is to say about it.

        A third of the room stays free for the question, so a long text is cut after a sentence.
        """
        text, limit = text.strip(), self.room * 2 // 3
        self.reference = trim(text, limit, self.n_tokens)
        cut = f"（太长，只留开头 {len(self.reference)} 字）" * (len(self.reference) < len(text))
        return f"资料{cut}：{self.reference or '无'}"


def choose_checkpoint(wanted: Path | None, repo: Path = REPO) -> Path:
    """The checkpoint the user named, else the newest run in out/, else the released model.

    raises: ConfigError if there is none at all
    """
    if wanted:
        return from_repo(wanted)
    release = repo / "release"
    found = newest_run(repo / "out") or newest_run(release)
    if found is None and not release.is_dir():
        raise ConfigError(
            "wanted a checkpoint, found none in out/ or release/; make one with python "
            "quickstart.py, or with pretrain.py and sft.py, or name one: python chat.py CHECKPOINT"
        )
    return found or release


def whole(text: str) -> str:
    """Text that can be encoded: half characters from a broken terminal become "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_reference(value: str) -> str:
    """The beginning of the file that `value` names, else `value` itself.

    raises: DataError if the file is no text, or if only the name of one that is missing was given
    """
    path = os.path.expanduser(value.strip())
    if "\0" in path or not os.path.isfile(path):
        if path.endswith((".txt", ".md")) and "\n" not in path:
            raise DataError(f"没有文件 {path!r}；请检查路径，或直接写出资料的文字")
        return whole(value)
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            with open(path, encoding=encoding) as file:
                return file.read(MOST_CHARACTERS)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}：应为 UTF-8 或 GB18030 编码的文本，此文件不是；请换一个")
