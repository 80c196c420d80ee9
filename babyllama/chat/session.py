"""One talk with one model: what was said and what of it the model still sees, adapters, replies.

What the terminal shows is terminal.py's; commands that change a session are commands.py's. The chat
format is the tokenizer's. Nothing here prints.
"""

import codecs
import os
import re
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from babyllama.chat.terminal import whole
from babyllama.checkpoint import Loaded, find_adapter, load_adapter, read_adapter
from babyllama.config import REPO, from_repo, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Decoder, Reply, Weights
from babyllama.errors import ConfigError, DataError
from babyllama.generate import stream_text
from babyllama.language.letters import as_trained, likely_encoding
from babyllama.lora import switch
from babyllama.retrieval.index import excerpt, trim
from babyllama.retrieval.retriever import API_URL, INDEX, Context, Retriever
from babyllama.run_dir import TASKS, newest_run, read_info
from babyllama.sampling import SamplingConfig
from babyllama.scoring.summarise import Suggested, suggest
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

    def messages(self, first: int = 0, reference: str = "") -> list[dict]:
        """The 资料, if there is one, and the turns from `first` on.

        reference: stands in for the 资料
        """
        reference = reference or self.reference
        messages = [{"role": "system", "content": reference}] if reference else []
        for user, assistant in self.turns[first:]:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return messages

    def prompt_for(self, question: str, found: str = "") -> list[int]:
        """The ids to continue; whole oldest turns are let go until they fit, never the 资料.

        A third of the room is not for the 资料: of a longer one what the question is about stays.

        found: 资料 for this question alone, where there is no other
        raises: ConfigError if the question does not fit even alone; nothing is let go then
        """
        reference = excerpt(self.reference or found, question, self.room * 2 // 3, self.n_tokens)
        for first in range(self.first, len(self.turns) + 1):
            asked = [*self.messages(first, reference), {"role": "user", "content": question}]
            ids = self.tokenizer.render_prompt(as_trained(asked))
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
        left = self.room - len(self.tokenizer.render_prompt(as_trained(alone)))
        return max(min(self.room // 2, left - 4), 0)  # pieces are encoded apart: a few ids more

    def n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode_content(text))

    def set_reference(self, text: str) -> str:
        """Make `text` the 资料; returns what there is to say about it."""
        self.reference = text.strip()
        begin = trim(self.reference, self.room * 2 // 3, self.n_tokens)
        if begin == self.reference:
            return f"资料：{begin or '无'}"
        n = len(self.reference)
        return f"资料（太长，共 {n} 字：每次只看与问题最有关的部分）：{begin}……"


def choose_checkpoint(wanted: Path | None, repo: Path = REPO, lora: Sequence[str] = ()) -> Path:
    """The checkpoint the user named, else the base of the first adapter, else the newest run in
    out/, else the released model.

    raises: ConfigError if there is none at all
    """
    if wanted is None and lora:
        base = read_adapter(find_adapter(named(lora[0])[1]))[1]["base"]
        wanted = Path(base) if base else None
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


def open_retriever(index: Path | None, is_needed: bool) -> Retriever | None:
    """The index that was named, or the usual one if it is there.

    raises: DataError if it cannot be used, ConfigError if one is needed and there is none
    """
    if index or INDEX.is_dir():
        return Retriever(index or INDEX)
    if is_needed:
        raise ConfigError(
            f"--retrieve wants a full-text index, found none in {shown(INDEX)}; make it with "
            f"python -m data_process.run wiki --index, or name one with --index"
        )
    return None


def read_reference(value: str) -> str:
    """The beginning of the file that `value` names, else `value` itself.

    raises: DataError if the file is no text, or if only the name of one that is missing was given
    """
    path = os.path.expanduser(_dragged(value.strip()))
    if "\0" in path or not os.path.isfile(path):
        if "\n" not in path and (path.endswith((".txt", ".md")) or _PATH.match(path)):
            raise DataError(f"没有文件 {path!r}；请检查路径，或直接写出资料的文字")
        return whole(value)
    with open(path, "rb") as file:
        data = file.read(4 * MOST_CHARACTERS)
    return decoded(data, path, is_cut=len(data) == 4 * MOST_CHARACTERS)[:MOST_CHARACTERS]


def decoded(data: bytes, place: str, is_cut: bool = False) -> str:
    """Text in UTF-8, GB18030 or another encoding of Chinese files; a mark at its beginning goes.

    is_cut: the last character need not be whole
    raises: DataError if it is neither
    """
    encoding = likely_encoding(data)
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder(encoding or "gb18030")().decode(data, final=not is_cut)
        return text.replace("\r\n", "\n")
    raise DataError(
        f"{place}：应为 UTF-8 或 GB18030 编码的文本，收到的两者都不是；请换一个，或先转换编码"
    )


_PATH = re.compile(r"(~|\.{1,2})?[/\\]\S*[/\\]|[A-Za-z]:[/\\]")  # /home/me/…, ./a/b, C:\\…


def _dragged(value: str) -> str:
    """A file's name without what terminals write round one that is dragged in."""
    bare = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    plain = re.sub(r"\\(?=[^\w\\])", "", bare)  # a shell writes a space so
    return next((one for one in (bare, plain) if os.path.isfile(one)), bare)


@dataclass
class Asked:
    """A question on its way.

    found: the passages that were looked up for it; None where nothing was looked up
    lets_go: the first turns leave what the model sees, and none has before
    text: what was replied so far
    reason: how the reply ended, see decoder.Reply; interrupted: by the user; context: it is full
    """

    question: str
    prompt: list[int]
    found: Context | None = None
    lets_go: bool = False
    text: str = ""
    reason: str = ""
    n_tokens: int = 0


class Session:
    """A conversation with a checkpoint."""

    def __init__(
        self,
        loaded: Loaded,
        sampling: SamplingConfig,
        weights: Weights = "auto",
        adapters: Sequence[str] = (),
        retriever: Retriever | None = None,
        retrieve: bool = False,
        wiki_url: str = API_URL,
    ) -> None:
        """adapters: NAME=PLACE each, all on this model; the first one works at the beginning

        raises: CheckpointError if an adapter belongs to another base
        """
        loaded.tokenizer.require_dialogue()
        self.loaded, self.sampling, self.weights = loaded, sampling, weights
        self.retriever, self.retrieve, self.wiki_url = retriever, retrieve, wiki_url
        self.adapters = dict(map(named, adapters))
        if len(self.adapters) < len(adapters):
            raise ConfigError(f"--lora wants different names, found {', '.join(adapters)}")
        for name, place in self.adapters.items():
            load_adapter(loaded.model, place, name)
        context = loaded.config.max_seq_len
        room = context - min(sampling.max_new_tokens, context // 4)
        self.talk = Conversation(loaded.tokenizer, room)
        self.decoder: Decoder
        self.use_adapter(next(iter(self.adapters), None))

    def use_adapter(self, name: str | None) -> None:
        """Talk with an adapter, or with None to the base alone.

        raises: ConfigError if there is none of this name
        """
        if name is not None and name not in self.adapters:
            there = "、".join(self.adapters) or "启动时没有给 --lora"
            raise ConfigError(f"没有 LoRA {name!r}；有：{there}；- 为只用基座")
        if self.adapters:
            switch(self.loaded.model, name)
        self.adapter = name
        self.decoder = make_decoder(self.loaded.model, self.weights)

    def ask(self, question: str) -> Asked:
        """A question made ready: what is looked up for it, and the prompt.

        raises: ConfigError if it is too long
        """
        found = None
        if self.retrieve and self.retriever and not self.talk.reference:
            room = self.talk.reference_room(question)
            found = self.retriever.context(question, room, self.talk.n_tokens)
        before = self.talk.first
        prompt = self.talk.prompt_for(question, found.text if found else "")
        return Asked(question, prompt, found, lets_go=before == 0 < self.talk.first)

    def answer(self, asked: Asked) -> Generator[str, None, None]:
        """The reply as it comes; when it ends, by itself or by Ctrl-C, it is part of the talk,
        unless it is blank."""
        end = Reply()
        try:
            tokenizer = self.loaded.tokenizer
            for piece in stream_text(self.decoder, asked.prompt, self.sampling, tokenizer, end):
                asked.text += piece
                yield piece
        finally:
            # Ctrl-C while the caller prints closes the generator: nothing says so but this.
            asked.n_tokens = len(end.ids)
            is_full = end.reason == "length" and asked.n_tokens < self.sampling.max_new_tokens
            asked.reason = "context" if is_full else end.reason or "interrupted"
            if asked.text.strip():
                self.talk.turns.append((asked.question, asked.text))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model was trained for; adapters may bring anything."""
        return TASKS if self.adapters else tasks_of(self.loaded.path)

    def summarise(self, text: str, n: int = 1) -> Suggested:
        """At most n titles of an abstract."""
        return suggest(self.decoder, self.loaded.tokenizer, text, n)

    def record(self, asked: Asked) -> dict:
        """A reply, written to its end, as an object for JSON."""
        for _ in self.answer(asked):
            pass
        found, of_it = asked.found, asked.found.text if asked.found else ""
        return {
            "prompt": asked.question, "reply": asked.text, "finish_reason": asked.reason,
            "n_prompt_tokens": len(asked.prompt), "n_reply_tokens": asked.n_tokens,
            "checkpoint": shown(self.loaded.path), "lora": self.adapter,
            "reference": self.talk.reference or of_it,
            "passages": None if found is None else [asdict(each) for each in found.passages],
        }  # fmt: skip


def named(word: str) -> tuple[str, Path]:
    """NAME=PLACE; without a name the place's own name is taken."""
    name, equals, place = word.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        path = Path(word)
        name, place = re.sub(r"\W", "_", path.name), word
    return name, from_repo(place)


def tasks_of(path: Path) -> tuple[str, ...]:
    """Tasks that a checkpoint was trained for, the best first, as its model.yaml states it.

    One that states nothing may be asked all that others of its kind learn.
    """
    info = read_info(path)
    usual: dict[str, tuple[str, ...]] = {"pretrain": ("continue",), "vqa": ("chat",)}
    return tuple(info.get("tasks") or usual.get(info["kind"], ("chat", "reference", "title")))
