"""What a step makes smaller: a loss function, and what it is divided by.

The training loop knows an Objective and nothing of its kind. `next_token` is the language model's
own; `dpo` prefers one answer to another (Rafailov et al. 2023, arXiv:2305.18290, equation 7), if
wanted with the chosen answer's own likelihood beside it (Pang et al. 2024, arXiv:2404.19733,
equation 1), and is one function of the model and a batch of pairs (sources.py: Pairs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.errors import ConfigError
from model import Loss

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Loss]


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """The language model's own loss."""
    return model(**batch)


def n_targets(batch: Batch) -> Tensor:
    """How many tokens are learnt."""
    return (batch["targets"] >= 0).sum()


@dataclass(frozen=True)
class Objective:
    """A loss and what belongs to it.

    loss: of a micro-batch in training; its `loss_sum` is what gradients are computed of
    count: what the sum over a whole step is divided by
    measure: the loss in validation
    is_of_tokens: whether `measure` counts tokens, so that bits per byte mean something
    """

    loss: LossFunction = next_token_loss
    count: Callable[[Batch], Tensor] = n_targets
    measure: LossFunction = next_token_loss
    is_of_tokens: bool = True


def next_token(label_smoothing: float = 0.0) -> Objective:
    """The language model's own objective; validation is never smoothed."""
    if not label_smoothing:
        return Objective()
    return Objective(lambda model, batch: model(**batch, label_smoothing=label_smoothing))


def dpo(reference: nn.Module, beta: float = 0.1, nll: float = 0.0) -> Objective:
    """Raise the chosen answer above the rejected one, as seen from a reference that stays.

    The figures count pairs: without `nll` the loss begins at log 2; `accuracy` is the share of
    pairs whose chosen answer has gained on the other. Validation measures the preference alone.

    reference: the model at the beginning, whole, on the device
    beta: how dear it is to leave the reference
    nll: how much the chosen answer's own loss, a mean over its tokens, counts beside it
    raises: ConfigError if beta is no positive number or nll a negative one
    """
    if not 0 < beta < math.inf:
        raise ConfigError(f"dpo_beta wants a number above 0, found {beta}; 0.1 is usual")
    if not 0 <= nll < math.inf:
        raise ConfigError(f"dpo_nll wants 0 or more, found {nll}; 1 is usual, 0 leaves it out")
    reference = reference.eval().requires_grad_(False)

    def preference(model: nn.Module, batch: Batch, nll: float = 0.0) -> Loss:
        with torch.no_grad():
            before = answer_log_probs(reference, batch)
        after = answer_log_probs(model, batch)  # (B, pairs, 2)
        gains = after - before
        margins = beta * (gains[..., 0] - gains[..., 1])
        exists = _pairs_of(batch)[:, None] > torch.arange(margins.shape[1], device=margins.device)
        losses = -F.logsigmoid(margins)
        if nll:
            losses = losses - nll * after[..., 0] / answer_lengths(batch)[..., 0].clamp(min=1)
        losses = torch.where(exists, losses, 0.0)
        return Loss(losses.sum(), exists.sum(), ((margins > 0) & exists).sum())

    return Objective(
        partial(preference, nll=nll),
        lambda batch: _pairs_of(batch).sum(),
        preference,
        is_of_tokens=False,
    )


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probabilities of the chosen and the rejected answer of each pair.

    returns: (B, pairs, 2) float32; 0 for pairs that a sequence has fewer than the others
    """
    return _by_answer(-model(**batch, per_position=True), batch)


def answer_lengths(batch: Batch) -> Tensor:
    """How many tokens of each answer are learnt, (B, pairs, 2) float32."""
    return _by_answer((batch["targets"] >= 0).float(), batch)


def _by_answer(values: Tensor, batch: Batch) -> Tensor:
    """Sums of a value of each token (B, T) over each answer, (B, pairs, 2)."""
    segments = _segments(batch)
    n_pairs = int(_pairs_of(batch).max())
    sums = values.new_zeros(len(segments), 2 * n_pairs + 1)
    sums = sums.scatter_add(1, segments, values)
    return sums[:, 1:].unflatten(1, (n_pairs, 2))


def _segments(batch: Batch) -> Tensor:
    # A rank that has run out of sequences gets empty ones, without segments.
    return batch.get("segments", torch.zeros_like(batch["tokens"]))


def _pairs_of(batch: Batch) -> Tensor:
    """How many pairs each sequence holds, (B,): the segments 1 and 2, 3 and 4, ..."""
    return _segments(batch).amax(dim=1) // 2
