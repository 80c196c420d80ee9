"""Choosing the next token: pure functions of logits, and the rules that look at the text.

Owns SamplingConfig. What runs the model and keeps the replies: decoder.py and generate.py.

Sources: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), min_p (Nguyen et al. 2024,
arXiv:2407.01082), repetition penalty (Keskar et al. 2019, section 4.1), frequency penalty as in
OpenAI's interface.
Axes: B rows of a batch, V vocabulary, S tokens said.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

import torch
from torch import Tensor

from babyllama.errors import require

# Random numbers for one choice; nearly always the first or the second is enough.
N_CHANCES = 6

# Below this the likeliest token is the only one left, and dividing by it may overflow.
COLDEST = 1e-6

# A reply loops where a run of so many characters stands in it for this time.
LOOP_LENGTH, LOOP_TIMES = 10, 3

Kind = TypeVar("Kind", bound="SamplingConfig")


@dataclass(frozen=True)
class SamplingConfig:
    """Choice of the next token.

    Args:
        max_new_tokens: longest reply
        temperature: flattens (> 1) or sharpens (< 1) the choice; 0 takes the likeliest token
        top_p: choose among the likeliest tokens that together have this probability
        top_k: choose among this many tokens at most; 0: no limit
        min_p: leave out tokens less likely than this share of the likeliest one; 0: none
        repetition_penalty: above 1: tokens that were already there become less likely
        frequency_penalty: taken from a token's logit for each time the reply holds it
        no_repeat_ngram: no run of so many characters comes twice in a reply; 0: any may
        stop: end the reply before the first of these texts
        loop_guard: what to do when 10 characters in a row come for the third time in a reply:
            nothing (off), end the reply there (end), or take another token (redraw)
        n: replies to each prompt
        seed: of the choice; null: a new one each time
    """

    max_new_tokens: int = 256
    temperature: float = 0.5
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    stop: list[str] = field(default_factory=list)
    loop_guard: Literal["off", "end", "redraw"] = "off"
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": ("1 or more", self.max_new_tokens >= 1),
            "temperature": ("0 to 10", 0 <= self.temperature <= 10),
            "top_p": ("above 0, at most 1", 0 < self.top_p <= 1),
            "top_k": ("0 or more", self.top_k >= 0),
            "min_p": ("0 to 1", 0 <= self.min_p <= 1),
            "repetition_penalty": ("above 0, at most 10", 0 < self.repetition_penalty <= 10),
            "frequency_penalty": ("-10 to 10", -10 <= self.frequency_penalty <= 10),
            "no_repeat_ngram": ("0 or more", self.no_repeat_ngram >= 0),
            "stop": ("no empty text", all(self.stop)),
            "loop_guard": ("off, end or redraw", self.loop_guard in ("off", "end", "redraw")),
            "n": ("1 or more", self.n >= 1),
        }
        require("sampling", self, wanted)

    @property
    def reads_text(self) -> bool:
        """True if a rule looks at the reply's characters, not its tokens alone."""
        return bool(self.stop or self.no_repeat_ngram or self.loop_guard != "off")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0


def alone(config: SamplingConfig, kind: type[Kind]) -> Kind:
    """The settings of choosing in a larger config."""
    return kind(**{each.name: getattr(config, each.name) for each in fields(kind)})


# What chooses: `choose`, or a faster one with the same arguments (cpu/decoder.py).
Chooser = Callable[[Tensor, SamplingConfig, Tensor], Tensor]


def penalise(
    logits: Tensor, sampling: SamplingConfig, said: Tensor, n_prompt: int, eos_id: int
) -> Tensor:
    """Logits in which tokens that were said are less likely; the end of a reply never is.

    logits: (B, V); said: (B, S) ids, of which the first n_prompt are the prompt's
    """
    if sampling.repetition_penalty != 1:
        # Positions of images (vqa/) are negative and no tokens: <bos> stands in for them.
        said = torch.where(said < 0, said[:, :1], said)
        found = logits.gather(1, said)
        penalty = sampling.repetition_penalty
        weaker = torch.where(found > 0, found / penalty, found * penalty)
        penalised = logits.scatter(1, said, weaker)
        if 0 <= eos_id < logits.shape[1]:
            penalised[:, eos_id] = logits[:, eos_id]
        logits = penalised
    if sampling.frequency_penalty:
        reply = said[:, n_prompt:]
        cost = logits.new_full(reply.shape, -sampling.frequency_penalty)
        logits = logits.scatter_add(1, reply, cost)
    return logits


def choose(logits: Tensor, sampling: SamplingConfig, chances: Tensor) -> Tensor:
    """The next token of each row.

    Drawing from all tokens, and again where the one drawn lies outside of the nucleus, is drawing
    from the nucleus, and spares the sorting. Only the last number is spent on a sorted nucleus.

    logits: (B, V) float32
    chances: (B, N_CHANCES) uniform random numbers above 0, at most 1
    returns: (B,)
    """
    if sampling.temperature < COLDEST:
        return logits.argmax(dim=-1)
    top = logits.amax(dim=-1, keepdim=True)
    powers = (logits - top).mul_(1 / sampling.temperature).exp_()  # 1 for the likeliest token
    if sampling.top_k or chances.shape[1] == 1:
        return _choose_sorted(powers, sampling, chances[:, -1:])
    sums = powers.cumsum(dim=-1)
    tries = torch.searchsorted(sums, chances[:, :-1] * sums[:, -1:])  # (B, N_CHANCES - 1)
    own = powers.gather(1, tries)
    before = torch.where(powers[:, None] > own[..., None], powers[:, None], 0).sum(dim=-1)
    inside = (before < sampling.top_p * sums[:, -1:]) & (own >= sampling.min_p)
    first = tries.gather(1, inside.int().argmax(dim=1, keepdim=True)).squeeze(1)
    found = inside.any(dim=1)
    if powers.device.type == "cpu" and found.all():  # a card would have to wait for the answer
        return first
    return torch.where(found, first, _choose_sorted(powers, sampling, chances[:, -1:]))


def _choose_sorted(powers: Tensor, sampling: SamplingConfig, chance: Tensor) -> Tensor:
    """The same with the tokens sorted, or the top_k of them: (B,).

    powers: (B, V), shares of the likeliest token's probability; chance: (B, 1)
    """
    V = powers.shape[1]
    values, tokens = powers.topk(min(sampling.top_k or V, V), dim=-1)
    sums = values.cumsum(dim=-1)
    total = powers.sum(dim=-1, keepdim=True)
    kept = (sums - values < sampling.top_p * total) & (values >= sampling.min_p)
    n_kept = kept.sum(dim=-1, keepdim=True).clamp(min=1)  # the likeliest token always stays
    place = torch.searchsorted(sums, chance * sums.gather(1, n_kept - 1))
    return tokens.gather(1, place).squeeze(1)


def squeeze(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def repeats(text: str, n: int, times: int = 2) -> bool:
    """True if some run of `n` characters stands in the text so many times."""
    counts = Counter(text[start : start + n] for start in range(len(text) - n + 1))
    return max(counts.values(), default=0) >= times


def loops(text: str) -> bool:
    """True if a text falls into a loop."""
    return repeats(squeeze(text), LOOP_LENGTH, LOOP_TIMES)


def until_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    ends = [place for end in stop if (place := text.find(end)) >= 0]
    return text[: min(ends, default=len(text))]


def n_showable(text: str, stop: Sequence[str]) -> int:
    """Number of characters of an unfinished text that cannot be part of a text that ends it."""
    shown = len(until_stop(text, stop))
    for end in stop:
        for n in range(min(len(end) - 1, len(text)), 0, -1):
            if text.endswith(end[:n]):
                shown = min(shown, len(text) - n)
                break
    return shown
