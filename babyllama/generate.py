"""Choosing the next token: one reply as a stream, or many at once with a shared KV cache.

Sources: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), repetition penalty (Keskar et
al. 2019, section 4.1).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from babyllama.errors import ConfigError
from model import KVCache, Transformer

# Nearly every nucleus fits into so many tokens; sorting them is far cheaper than sorting V.
_NUCLEUS = 256

# Below this the likeliest token is the only one left, and dividing by it may overflow.
_COLDEST = 1e-6


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest reply
        temperature: flattens (> 1) or sharpens (< 1) the choice; 0 takes the likeliest token
        top_p: choose among the likeliest tokens that together have this probability
        top_k: choose among this many tokens at most; 0: no limit
        repetition_penalty: above 1: tokens that were already there become less likely
        seed: of the choice; null: a new one each time
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        faults = [
            text
            for is_bad, text in (
                (self.max_new_tokens < 1, f"max_new_tokens {self.max_new_tokens} (at least 1)"),
                (not 0 <= self.temperature <= 10, f"temperature {self.temperature} (0 to 10)"),
                (not 0 < self.top_p <= 1, f"top_p {self.top_p} (above 0, at most 1)"),
                (self.top_k < 0, f"top_k {self.top_k} (0 or more)"),
                (
                    not 0 < self.repetition_penalty <= 10,
                    f"repetition_penalty {self.repetition_penalty} (above 0, at most 10)",
                ),
            )
            if is_bad
        ]
        if faults:
            raise ConfigError("sampling cannot use " + ", ".join(faults))


def stream(
    model: Transformer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    eos_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens of one reply as they are chosen, without <eos>.

    raises: ConfigError if the prompt leaves no room in the context
    """
    for _, ids in _steps(model, [prompt], sampling, eos_id, generator):
        if ids[0] != eos_id:
            yield ids[0]


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, eos_id: int
) -> list[list[int]]:
    """A reply for each prompt, without <eos>. Prompts may differ in length; like lengths together
    waste least.

    raises: ConfigError if a prompt leaves no room in the context
    """
    replies: list[list[int]] = [[] for _ in prompts]
    for rows, ids in _steps(model, prompts, sampling, eos_id):
        for row, token in zip(rows, ids, strict=True):
            if token != eos_id:
                replies[row].append(token)
    return replies


def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[list[int], list[int]]]:
    """The unfinished rows and their next tokens, step by step; finished rows leave the batch."""
    if not prompts:
        return
    device = model.rope.device
    if generator is None and sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(sampling.max_new_tokens, model.config.max_seq_len - n) for n in lengths]
    if min(lengths) < 1 or min(limits) < 1:
        raise ConfigError(
            f"a prompt of {max(lengths)} tokens leaves no room for a reply in the model's context "
            f"of {model.config.max_seq_len}, or a prompt is empty; shorten it"
        )
    width = max(lengths)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)  # filler: any id, never seen
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
    start = torch.tensor([width - n for n in lengths], device=device)
    tokens = tokens.to(device)
    with torch.inference_mode():
        cache = KVCache(model.config, start, width + max(limits), model.output.weight.dtype)
        seen = _seen(tokens, start, model.config.vocab_size) if penalised(sampling) else None
    rows, steps = list(range(len(prompts))), 0
    while rows:
        # A generator must not be left inside inference_mode: its caller would be in it, too.
        with torch.inference_mode():
            logits = model.output(model.hidden(tokens, cache=cache)[:, -1]).float()
            chosen = choose(logits, sampling, seen, generator)
            ids = chosen.tolist()
        yield rows, ids
        steps += 1
        going = [
            i
            for i, (row, token) in enumerate(zip(rows, ids, strict=True))
            if token != eos_id and steps < limits[row]
        ]
        with torch.inference_mode():
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            if 0 < len(going) < len(rows):
                kept = torch.tensor(going, device=device)
                cache.keep(kept)
                chosen = chosen[kept]
                seen = None if seen is None else seen[kept]
            tokens = chosen[:, None]
        rows = [rows[i] for i in going]


def penalised(sampling: SamplingConfig) -> bool:
    """Whether the choice depends on what was already said."""
    return sampling.repetition_penalty != 1


def _seen(tokens: Tensor, start: Tensor, vocab_size: int) -> Tensor:
    """Which tokens each prompt holds, filler aside: (B, V) bool."""
    is_prompt = torch.arange(tokens.shape[1], device=tokens.device) >= start[:, None]
    counts = torch.zeros(len(tokens), vocab_size, dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, is_prompt.int()) > 0


def choose(
    logits: Tensor,
    sampling: SamplingConfig,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row.

    logits: (B, V) float32; seen: (B, V) bool, tokens to penalise
    returns: (B,)
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        weaker = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, weaker, logits)
    if sampling.temperature < _COLDEST:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    total = logits.logsumexp(dim=-1, keepdim=True)
    values, tokens = _candidates(logits, total, sampling)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    # The likeliest token always stays.
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


def _candidates(logits: Tensor, total: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, largest first: enough of them to hold the nucleus of every row."""
    vocab_size = logits.shape[-1]
    if sampling.top_k:
        return logits.topk(min(sampling.top_k, vocab_size), dim=-1)
    values, tokens = logits.topk(min(_NUCLEUS, vocab_size), dim=-1)
    if bool(((values - total).exp().sum(dim=-1) >= sampling.top_p).all()):
        return values, tokens
    return logits.sort(dim=-1, descending=True)
