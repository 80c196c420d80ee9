"""Replies under way: a model with a way to continue, a batch with its cache, the rules that end a
reply.

A Decoder is a model with a way to continue by one token: plain_decoder's here, or a faster one
(cpu/decoder.py). A Batch keeps what is known of replies that are being written: prompts are filled
up on the left and read at once; each further token is a step. Logits that are no finite numbers are
computed again in float32. Beam search is an extra: scoring/beams.py.
"""

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from babyllama.errors import CheckpointError, ConfigError
from babyllama.sampling import (
    N_CHANCES,
    Chooser,
    SamplingConfig,
    choose,
    loops,
    penalise,
    repeats,
    squeeze,
    until_stop,
)
from model import KVCache, Transformer
from tokenizer import Tokenizer

Weights = Literal["auto", "float32", "int8"]


@dataclass(frozen=True)
class Decoder:
    """A model with a way to continue by one token.

    step: takes the newest token of each row (B,) and the cache of all before them, to which it
        adds; returns logits (B, V) float32
    kind: how the weights are held, for people
    reason: why it was chosen, for people
    reader: a faster way than the model's to take several tokens of each row (B, T) at once
    cache_dtype: of the keys and values in the cache; null: that of the weights
    choose: what draws the next tokens
    """

    model: Transformer
    step: Callable[[Tensor, KVCache], Tensor]
    kind: str
    reason: str = ""
    reader: Callable[[Tensor, KVCache], Tensor] | None = None
    cache_dtype: torch.dtype | None = None
    choose: Chooser = choose

    def new_cache(self, start: Tensor, size: int) -> KVCache:
        """An empty cache; arguments as KVCache."""
        dtype = self.cache_dtype or self.model.output.weight.dtype
        return KVCache(self.model.config, start, size, dtype)

    def are_finite(self, logits: Tensor) -> bool:
        """True if logits (B, V) of this decoder are numbers to go on with."""
        # int8.c makes a row NaN as a whole; so one look at each row spares reading all.
        seen = logits[:, 0] if self.kind == "int8" else logits.amax(dim=1)
        return bool(torch.isfinite(seen).all())

    def read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add tokens (B, T) to the cache; returns the logits after the last ones (B, V) float32."""
        if self.reader is not None:
            return self.reader(tokens, cache)
        return self.model.output(self.model.hidden(tokens, cache=cache)[:, -1]).float()


def plain_decoder(model: Transformer) -> Decoder:
    """Steps by the model itself: on any device, in any format."""
    return Decoder(model, partial(_plain_step, model), str(model.output.weight.dtype)[6:])


def _plain_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    return model.output(model.hidden(tokens[:, None], cache=cache)[:, -1]).float()


class Batch:
    """Prompts that were read, and the logits of what follows each.

    said: (B, S) ids of prompt and reply; padding repeats a token of its row, so that who asks what
        was said need not know of it
    """

    def __init__(
        self,
        model: Transformer | Decoder,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        copies: int,
    ) -> None:
        self.decoder = model if isinstance(model, Decoder) else plain_decoder(model)
        net = self.decoder.model
        lengths = [len(prompt) for prompt in prompts]
        longest, context = max(lengths), net.config.max_seq_len
        if min(lengths) < 1 or longest >= context:
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room for a reply in the model's context "
                f"of {context}, or a prompt is empty; shorten it"
            )
        self.limits = [min(n_new, context - n) for n in lengths for _ in range(copies)]
        self.width, self.size = longest, longest + max(self.limits)
        device = net.rope.device
        filled = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.said = torch.tensor(filled, device=device)
        self.start = torch.tensor([longest - n for n in lengths], device=device)
        self.owners = list(range(len(prompts)))  # the prompt of each row
        self.read()
        if copies > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(copies)])

    def read(self) -> None:
        """Compute the cache and the logits from all that was said."""
        self.cache = self.decoder.new_cache(self.start, self.size)
        self.logits = self._finite(self.decoder.read(self.said, self.cache))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; a row may come several times."""
        kept = torch.tensor(rows, device=self.said.device)
        owners = [self.owners[row] for row in rows]
        # Rows that change places with others of their prompt share its keys and values.
        self.cache.keep(kept, self.width if owners == self.owners else 0)
        self.owners = owners
        self.said, self.logits, self.start = self.said[kept], self.logits[kept], self.start[kept]

    def add(self, ids: list[int]) -> None:
        """Continue each row by a token."""
        tokens = torch.tensor(ids, device=self.said.device)
        self.said = torch.cat((self.said, tokens[:, None]), dim=1)
        self.logits = self._finite(self.decoder.step(tokens, self.cache))

    def penalised(self, sampling: SamplingConfig, eos_id: int) -> Tensor:
        """The logits after the penalties for what was said."""
        if not sampling.penalises:
            return self.logits
        return penalise(self.logits, sampling, self.said, self.width, eos_id)

    def _finite(self, logits: Tensor) -> Tensor:
        """The logits, computed again in float32 where they are no finite numbers.

        raises: CheckpointError if that does not help
        """
        if self.decoder.are_finite(logits):
            return logits
        net = self.decoder.model
        if net.output.weight.dtype == torch.float32 and self.decoder.kind == "float32":
            raise CheckpointError(
                "wanted finite logits, found some that are not, in float32 too; the checkpoint is "
                "damaged or its training diverged; use an earlier one"
            )
        warnings.warn(
            f"logits in {self.decoder.kind} were not finite; going on in float32",
            RuntimeWarning,
            stacklevel=1,
        )
        plain = plain_decoder(copy.deepcopy(net).float())
        self.decoder = replace(plain, choose=self.decoder.choose)
        self.read()
        return self.logits


# A reply whose rules refuse so many tokens at one place has nothing left to say.
MOST_REFUSED = 50
NOTHING = -2  # no token's id


@dataclass
class Reply:
    """One reply and how it ended.

    ids: its tokens without <eos>; with the token that holds the end of a stop text
    text: what a reader gets, cut before a stop text; empty where no tokenizer was given
    reason: eos; length: the longest reply or the end of the context; stop; loop: the rules against
        repetition left no other way; "" while it is written
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Literal["", "eos", "length", "stop", "loop"] = ""


class Rules:
    """Rules that end a reply, and forbid tokens to follow it."""

    def __init__(self, sampling: SamplingConfig, eos_id: int, tokenizer: Tokenizer | None) -> None:
        if sampling.reads_text and tokenizer is None:
            raise ValueError("stop, no_repeat_ngram and loop_guard look at text: give a tokenizer")
        self.sampling, self.eos_id, self.tokenizer = sampling, eos_id, tokenizer

    def allow(self, ids: list[int], token: int) -> bool:
        """True if the rules against repetition let this token follow."""
        n, redraws = self.sampling.no_repeat_ngram, self.sampling.loop_guard == "redraw"
        if token == self.eos_id or not (n or redraws):
            return True
        text = self._text(ids, token)
        return not (redraws and loops(text)) and not (n and repeats(squeeze(text), n))

    def extend(self, reply: Reply, token: int, limit: int) -> None:
        """Lengthen a reply by a token, or end it, or both."""
        ends = self.sampling.loop_guard == "end"
        if token == self.eos_id:
            reply.reason = "eos"
        elif token == NOTHING or (ends and loops(self._text(reply.ids, token))):
            reply.reason = "loop"
        else:
            reply.ids.append(token)
            if len(reply.ids) >= limit:
                reply.reason = "length"
        if self.tokenizer and (reply.reason or self.sampling.stop):
            text = self.tokenizer.decode(reply.ids)
            reply.text = until_stop(text, self.sampling.stop)
            if len(reply.text) < len(text):
                reply.reason = "stop"

    def _text(self, ids: list[int], token: int) -> str:
        assert self.tokenizer is not None  # __init__ wants one where text is looked at
        return self.tokenizer.decode([*ids, token])


def random_numbers(logits: Tensor, chances: list[random.Random]) -> Tensor:
    """For each row of the logits what `choose` asks for, from its own source."""
    numbers = [[1 - chance.random() for _ in range(N_CHANCES)] for chance in chances]
    return torch.tensor(numbers, device=logits.device)


def redraw(
    logits: Tensor, token: int, ids: list[int], rules: Rules, chance: random.Random,
    choose: Chooser,
) -> int:  # fmt: skip
    """The token, or the first drawn after it that the rules allow, or NOTHING.

    logits: (V,) of which the token was drawn
    """
    logits = logits[None].clone()
    for _ in range(min(MOST_REFUSED, logits.shape[1])):
        if rules.allow(ids, token):
            return token
        logits[0, token] = -torch.inf
        token = int(choose(logits, rules.sampling, random_numbers(logits, [chance])))
    return NOTHING
