"""Beam search: the likeliest replies, where choose() draws one token at a time.

Source: length-normalised beams (Wu et al. 2016, arXiv:1609.08144, without the 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from babyllama.decoder import MOST_REFUSED, Batch, Decoder, Reply, Rules
from babyllama.errors import require
from babyllama.sampling import SamplingConfig
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class BeamConfig(SamplingConfig):
    """Choice of the replies, drawn or searched for.

    Args:
        beams: above 1: keep so many beginnings at once and return the likeliest replies; nothing
            is drawn then, so temperature, top_p, top_k, min_p and seed have no effect
        length_penalty: of beams: log-probabilities are divided by the length to this power
    """

    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {
            "n": ("1 to beams", self.beams <= 1 or self.n <= self.beams),
            "beams": ("1 or more", self.beams >= 1),
            "length_penalty": ("-10 to 10", -10 <= self.length_penalty <= 10),
        }
        require("sampling", self, wanted)


def extend_beams(logits: Tensor, scores: Tensor, k: int) -> list[tuple[float, int, int]]:
    """The k likeliest continuations by one token of beams whose log-probabilities are `scores`.

    logits: (B, V); scores: (B,)
    returns: (score, beam, token), best first
    """
    values, tokens = logits.log_softmax(dim=-1).topk(min(k, logits.shape[1]), dim=-1)
    found = (values + scores[:, None]).flatten().topk(min(k, values.numel()))
    beams = (found.indices // values.shape[1]).tolist()
    chosen = tokens.flatten()[found.indices].tolist()
    return list(zip(found.values.tolist(), beams, chosen, strict=True))


class _Beams:
    """The beam search of one prompt: unfinished replies and finished ones, each with its score,
    the best first."""

    def __init__(self, sampling: BeamConfig, rules: Rules, limit: int) -> None:
        self.sampling, self.rules, self.limit, self.length = sampling, rules, limit, 0
        self.unfinished = [(0.0, Reply())]  # with their log-probabilities
        self.finished: list[tuple[float, Reply]] = []  # divided by the length, see length_penalty

    def extend(self, logits: Tensor) -> list[int]:
        """Continue the unfinished replies by a token; returns which one each new one continues.

        The search ends, and nothing is returned, when enough replies are finished and no unfinished
        one is better than the worst of them.

        logits: (beams, V), of which the first rows belong to the unfinished replies
        """
        sampling, self.length = self.sampling, self.length + 1
        most, weight = sampling.beams, self.length**-sampling.length_penalty
        scores = torch.tensor([score for score, _ in self.unfinished], device=logits.device)
        n_wanted = 2 * most + (MOST_REFUSED if sampling.reads_text else 0)
        longer, parents = [], []
        for score, parent, token in extend_beams(logits[: len(scores)], scores, n_wanted):
            if len(longer) == most and token != self.rules.eos_id:
                continue  # what ends is still looked for, down to the last candidate
            said = self.unfinished[parent][1].ids
            if not self.rules.allow(said, token):
                continue
            reply = Reply(list(said))
            self.rules.extend(reply, token, self.limit)
            if reply.reason:
                self.finished.append((score * weight, reply))
            elif len(longer) < most:
                longer.append((score, reply))
                parents.append(parent)
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:most]
        self.unfinished = longer
        is_full = len(self.finished) == most
        if is_full and longer and longer[0][0] * weight <= self.finished[-1][0]:
            return []
        return parents


def search_beams(
    model: Transformer | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: BeamConfig,
    eos_id: int,
    tokenizer: Tokenizer | None = None,
) -> list[list[Reply]]:
    """The best replies to each prompt that a beam search finds, best first.

    returns: at least one and at most sampling.beams for each prompt
    """
    rules, most = Rules(sampling, eos_id, tokenizer), sampling.beams
    with torch.inference_mode():
        batch = Batch(model, prompts, sampling.max_new_tokens, most)
        every = going = [_Beams(sampling, rules, limit) for limit in batch.limits[::most]]
        while going:
            rows, ids, others = [], [], []
            parts = batch.penalised(sampling, eos_id).split(most)
            for number, (beams, logits) in enumerate(zip(going, parts, strict=True)):
                if parents := beams.extend(logits):
                    # A prompt keeps its number of rows; those that no reply needs repeat the first.
                    spare = most - len(parents)
                    rows += [number * most + row for row in parents + parents[:1] * spare]
                    new = [reply.ids[-1] for _, reply in beams.unfinished]
                    ids += new + new[:1] * spare
                    others.append(beams)
            going = others
            if going:
                batch.keep(rows)
                batch.add(ids)
    return [[reply for _, reply in one.finished] or [Reply(reason="loop")] for one in every]
