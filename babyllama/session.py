"""One talk with one model: its adapters, its 资料, and the replies as they come.

What the terminal shows is chat.py's; commands that change a session are chat_commands.py's.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from babyllama.checkpoint import Loaded
from babyllama.cli import from_repo, shown
from babyllama.conversation import Conversation
from babyllama.errors import ConfigError
from babyllama.fast import Decoder, Weights, make_decoder
from babyllama.generate import Reply, generate_replies, stream_text
from babyllama.lora import switch
from babyllama.lora_files import load_adapter
from babyllama.retrieval import API_URL, Context, Retriever
from babyllama.sampling import SamplingConfig
from babyllama.titles import Suggested, suggest

INTERRUPTED, FULL = "interrupted", "context"


@dataclass
class Asked:
    """A question on its way.

    found: the passages that were looked up for it; None where nothing was looked up
    lets_go: the first turns leave what the model sees, and none has before
    text: what was replied so far
    reason: how the reply ended, see generate.Reply; interrupted: by the user; context: it is full
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

    def answer(self, asked: Asked) -> Iterator[str]:
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
            asked.reason, asked.n_tokens = self._reason(end), len(end.ids)
            if asked.text.strip():
                self.talk.turns.append((asked.question, asked.text))

    def answers(self, asked: Asked) -> Iterator[Asked]:
        """sampling.n replies to one question, which are not part of the talk."""
        tokenizer = self.loaded.tokenizer
        for reply in generate_replies(
            self.decoder, [asked.prompt], self.sampling, tokenizer.eos_id, tokenizer
        ):
            reason = self._reason(reply)
            yield replace(asked, text=reply.text, reason=reason, n_tokens=len(reply.ids))

    def _reason(self, end: Reply) -> str:
        is_full = end.reason == "length" and len(end.ids) < self.sampling.max_new_tokens
        return FULL if is_full else end.reason or INTERRUPTED

    def summarise(self, text: str, n: int = 1) -> Suggested:
        """At most n titles of an abstract."""
        return suggest(self.decoder, self.loaded.tokenizer, text, n)

    def record(self, asked: Asked) -> dict:
        """A finished reply as an object for JSON."""
        found = asked.found.passages if asked.found else []
        return {
            "prompt": asked.question,
            "reply": asked.text,
            "finish_reason": asked.reason,
            "n_prompt_tokens": len(asked.prompt),
            "n_reply_tokens": asked.n_tokens,
            "checkpoint": shown(self.loaded.path),
            "lora": self.adapter,
            "reference": self.talk.reference or (asked.found.text if asked.found else ""),
            "passages": None if asked.found is None else [asdict(passage) for passage in found],
        }


def named(word: str) -> tuple[str, Path]:
    """NAME=PLACE; without a name the place's own name is taken."""
    name, equals, place = word.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        path = Path(word)
        name, place = re.sub(r"\W", "_", path.name), word
    return name, from_repo(place)
