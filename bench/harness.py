"""A checkpoint as lm-evaluation-harness wants a model: likelihoods and greedy replies.

`for_harness` returns the subclass of the harness' LM; all that it does is done by Scorer. The
context of a question is read once, whatever the number of its options: they continue its KV cache.
A text is cut as the harness' own Hugging Face model cuts it, so scores of an exported checkpoint
are the same. A dialogue is rendered by tokenizer.py, by ids; a 资料 that is too long is cut as
chat cuts it, then the dialogue's beginning, but for its head.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from babyllama.checkpoint import Loaded
from babyllama.cpu.decoder import make_decoder
from babyllama.errors import ConfigError
from babyllama.generate import generate_replies
from babyllama.retrieval.index import excerpt
from babyllama.sampling import SamplingConfig
from model import IGNORED, KVCache, token_losses
from tokenizer import LABELS, SEPARATOR

# End the question in a plain text; in a dialogue the assistant's label does.
ANSWER = re.compile(r"\s*(?:答案|解答)：\s*$")
# Options that share a context are read together; all sentences of ZhoBLiMP share an empty one.
MOST_OPTIONS = 16
MAX_NEW = 128  # tokens of a reply where a task does not say


class Store:
    """Answers by question, kept in a file, so that a run that was stopped goes on where it was;
    without a path in memory only. Lines that were cut or are damaged are passed over.

    about: what every answer depends on beside its question: the checkpoint and its format
    """

    def __init__(self, path: Path | None, about: object) -> None:
        self.path = path
        self.about = json.dumps(about, ensure_ascii=False, sort_keys=True, default=str)
        self.known: dict[str, Any] = {}
        for line in path.read_bytes().split(b"\n") if path and path.exists() else ():
            with suppress(ValueError):
                self.known.update([json.loads(line)])

    def key(self, *question: object) -> str:
        """A short name for a question."""
        text = self.about + json.dumps(question, ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def add(self, answers: Iterable[tuple[str, object]]) -> None:
        """Keep the answers of one chunk."""
        answers = list(answers)
        self.known.update(answers)
        if self.path:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(
                    "\n" + json.dumps(pair) for pair in answers
                )  # ends one that was cut


class Dialogue(str):
    """A dialogue on its way through the harness, which takes it for a text."""

    messages: list[dict]


class Group(NamedTuple):
    """One context and what may follow it, as ids.

    numbers: of the questions that the continuations belong to
    """

    context: list[int]
    continuations: list[list[int]]
    numbers: list[int]


class Scorer:
    """The three questions that the harness asks, answered in batches.

    is_chat: prompts are dialogues, else plain texts
    prefix_id: what stands before a text that has no context
    """

    def __init__(self, loaded: Loaded, batch_size: int, is_chat: bool, store: Store) -> None:
        super().__init__()
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.decoder = make_decoder(loaded.model, "float32")
        self.batch_size, self.is_chat, self.store = batch_size, is_chat, store
        # Training put <eos> before a document, <bos> before a dialogue.
        is_base = loaded.kind == "pretrain"
        self.prefix_id = loaded.tokenizer.eos_id if is_base else loaded.tokenizer.bos_id
        self.max_length = loaded.config.max_seq_len
        self.n_head = 1 + len(loaded.tokenizer.encode(LABELS["user"]))

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer."""
        return self.tokenizer.fingerprint

    # Texts to ids.

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The harness' messages as a dialogue of ours.

        What introduces the task goes before the first question. A question that begins with
        "资料：" gives its text to the system message, as dialogues about a text have it.
        """
        intro = ""
        if messages[0]["role"] == "system":
            intro, messages = messages[0]["content"].strip() + "\n", messages[1:]
        turns = [{"role": m["role"], "content": _bare(m)} for m in messages]
        system, first = [], turns[0]["content"]
        if first.startswith(LABELS["system"]) and len(turns) == 1:
            reference, _, first = first.removeprefix(LABELS["system"]).rpartition(SEPARATOR)
            system = [{"role": "system", "content": reference}]
        turns[0] = {"role": "user", "content": intro + first}
        turns = system + turns
        text = SEPARATOR.join(LABELS[t["role"]] + t["content"] for t in turns)
        dialogue = Dialogue(text + SEPARATOR + LABELS["assistant"])
        dialogue.messages = turns
        return dialogue

    def encode_context(self, context: str) -> list[int]:
        """The ids of a prompt, uncut."""
        if isinstance(context, Dialogue):
            return self.tokenizer.render_prompt(context.messages)
        return self.tokenizer.encode(context)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt and of what follows it; a plain text is encoded as one."""
        if isinstance(context, Dialogue):
            return self.encode_context(context), self.tokenizer.encode(continuation)
        bare = context.rstrip()
        if not bare:
            return [self.prefix_id], self.tokenizer.encode(context + continuation)
        # A token may hold the space between the two, so it belongs to what follows.
        before = self.tokenizer.encode(bare)
        whole = self.tokenizer.encode(context + continuation)
        if len(whole) > len(before):
            return before, whole[len(before) :]
        # One token holds the end of the context and the continuation: it is what is predicted.
        same = 0
        while same < len(whole) - 1 and whole[same] == before[same]:
            same += 1
        return whole[:same] or [self.prefix_id], whole[same:]

    def fit(self, context: str, ids: list[int], room: int) -> list[int]:
        """The ids of a prompt, cut to the room; of a 资料 the sentences stay that hold most of the
        question, as in chat."""
        turns = context.messages if isinstance(context, Dialogue) else []
        if len(ids) > room and turns and turns[0]["role"] == "system":
            reference, *turns = turns
            left = room - len(ids) + self._n_tokens(reference["content"])
            text = excerpt(reference["content"], turns[-1]["content"], left, self._n_tokens)
            ids = self.tokenizer.render_prompt([{**reference, "content": text}, *turns])
        return self.cut(ids, room, isinstance(context, Dialogue))

    def _n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode_content(text))

    def cut(self, ids: list[int], room: int, is_dialogue: bool) -> list[int]:
        """The last `room` ids; of a dialogue also its head, <bos> and the first label."""
        if len(ids) <= room:
            return ids
        n_head = self.n_head if is_dialogue and room > 2 * self.n_head else 0
        return ids[:n_head] + ids[len(ids) - (room - n_head) :]

    # The harness' questions.

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list:
        """(log-likelihood, whether greedy decoding would give it) of each continuation."""
        asked = [request.args for request in requests]
        pairs = [self.encode_pair(*args) for args in asked]
        for (context, after), (text, option) in zip(pairs, asked, strict=True):
            if not after:
                raise ConfigError(f"the option {option!r} has no token; leave the task out")
            if len(after) > self.max_length:
                del after[self.max_length // 2 :]
            context[:] = self.fit(text, context, self.max_length + 1 - len(after))
        keys = [self.store.key("loglikelihood", *map(str, args)) for args in asked]
        return self._loglikelihoods(pairs, keys)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Refused: no task here asks for the likelihood of whole texts."""
        raise NotImplementedError("python -m babyllama.analysis.perplexity has it")

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Greedy replies, each cut before the first of its stop texts."""
        settings = requests[0].args[1]  # the task's, the same for all of its rows
        if settings.get("do_sample") or settings.get("temperature"):
            raise ConfigError("a task asks for random replies, which would not come again")
        n_new = min(settings.get("max_gen_toks", MAX_NEW), self.max_length // 2)
        stop = settings.get("until") or []
        stop = [stop] if isinstance(stop, str) else list(filter(None, stop))
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_new, stop=stop)
        contexts = [request.args[0] for request in requests]
        keys = [self.store.key("generate", str(context), settings) for context in contexts]
        asked = []
        for key, context in zip(keys, contexts, strict=True):
            if key not in self.store.known:
                ids = self.encode_context(context)
                ids = self.fit(context, ids, self.max_length - n_new)
                asked.append((key, ids or [self.prefix_id]))
        asked.sort(key=lambda one: -len(one[1]))
        with tqdm(total=len(asked), unit=" replies", disable=not asked or None) as bar:
            for chunk in _chunks(asked, self.batch_size):
                replies = generate_replies(
                    self.decoder, [ids for _, ids in chunk], sampling, self.tokenizer.eos_id,
                    self.tokenizer,
                )  # fmt: skip
                self.store.add((key, r.text) for (key, _), r in zip(chunk, replies, strict=True))
                bar.update(len(chunk))
        return [self.store.known[key] for key in keys]

    def _loglikelihoods(self, pairs: list, keys: list[str]) -> list[tuple[float, bool]]:
        new = [n for n in range(len(pairs)) if keys[n] not in self.store.known]
        # Options that share a context stand together, the longest first: they are padded little.
        new.sort(key=lambda n: (pairs[n][0], -len(pairs[n][1])))
        groups = [
            Group(context, [pairs[n][1] for n in numbers], numbers)
            for context, same in groupby(new, key=lambda n: pairs[n][0])
            for numbers in _chunks(list(same), MOST_OPTIONS)
        ]
        with tqdm(total=len(new), unit=" options", disable=not new or None) as bar:
            for batch in self._batches(groups):
                found = self.score(batch)
                numbers = [number for group in batch for number in group.numbers]
                self.store.add((keys[n], f) for n, f in zip(numbers, found, strict=True))
                bar.update(len(numbers))
        return [tuple(self.store.known[key]) for key in keys]

    def _batches(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Groups of like length together; side by side they fit the context."""
        groups.sort(key=lambda g: (-len(g.context), -max(map(len, g.continuations))))
        batch: list[Group] = []
        for group in groups:
            longest = max(len(after) for g in [*batch, group] for after in g.continuations)
            width = max(len(g.context) for g in [*batch, group]) + longest - 1
            if batch and (len(batch) >= self.batch_size or width > self.max_length):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    # The model.

    @torch.inference_mode()
    def score(self, batch: list[Group]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation, group after group."""
        net, device = self.model, self.model.rope.device
        contexts = [group.context for group in batch]
        after = [ids for group in batch for ids in group.continuations]
        owner = [row for row, group in enumerate(batch) for _ in group.continuations]
        longest, n_after = max(map(len, contexts)), max(map(len, after))
        # Padding stands on the left of contexts, where it is not seen, and on the right of options.
        said = [[ids[0]] * (longest - len(ids)) + ids for ids in contexts]
        start = torch.tensor([longest - len(ids) for ids in contexts], device=device)
        cache = KVCache(net.config, start, longest + n_after - 1, net.output.weight.dtype)
        hidden = net.hidden(torch.tensor(said, device=device), cache=cache)[:, -1:]
        rows = torch.tensor(owner, device=device)
        hidden = hidden[rows]  # (N, 1, D)
        targets = torch.full((len(after), n_after), IGNORED, device=device)
        for row, ids in enumerate(after):
            targets[row, : len(ids)] = torch.tensor(ids, device=device)
        if n_after > 1:
            cache.keep(rows)
            more = net.hidden(targets[:, :-1].clamp(min=0), cache=cache)
            hidden = torch.cat((hidden, more), dim=1)  # (N, n_after, D)
        losses, hits = token_losses(hidden, net.output.weight, targets)
        are_hit = (hits | (targets == IGNORED)).all(dim=1)
        return list(zip((-losses.sum(dim=1)).tolist(), are_hit.tolist(), strict=True))


def _bare(message: dict) -> str:
    """What a turn says; the words that ask for the answer belong to plain texts."""
    return ANSWER.sub("", message["content"]).strip()


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def for_harness(loaded: Loaded, batch_size: int, is_chat: bool, store: Store) -> Scorer:
    """The model for lm_eval.evaluate; needs the package."""
    from lm_eval.api.model import LM

    make: Callable[..., Scorer] = type("BabyLlama", (Scorer, LM), {"__doc__": Scorer.__doc__})
    return make(loaded, batch_size, is_chat, store)
