"""What a run measures: sums over ranks, the validation pass, time between logged steps, samples."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from babyllama.data import ValData
from babyllama.device import Scaler, memory_gb
from babyllama.generate import SamplingConfig, generate
from babyllama.metrics import accuracy, perplexity
from babyllama.objectives import LossFunction, next_token_loss
from babyllama.parallel import World, inner, whole_model
from model import IGNORED, Loss
from tokenizer import Tokenizer


def on_cpu(loss: Loss) -> Tensor:
    """Its three sums; (3,) float64, which Apple's GPUs do not have."""
    return torch.stack([part.detach().float() for part in loss]).cpu().double()


def over_ranks(sums: Tensor, world: World) -> Tensor:
    """Sums of this process added to those of the others."""
    return world.sum(sums.float().to(world.device)).cpu().double() if world.size > 1 else sums


def means(sums: Sequence[float]) -> dict:
    """Loss, perplexity and accuracy from (loss_sum, n_targets, n_correct, ...)."""
    loss_sum, n_correct = sums[0], sums[2]
    n_targets = max(1.0, sums[1])
    return {
        "loss": loss_sum / n_targets,
        "ppl": perplexity(loss_sum, n_targets),
        "accuracy": accuracy(n_correct, n_targets),
        "n_targets": int(sums[1]),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ValData,
    micro_batch_size: int,
    scaler: Scaler,
    world: World,
    tokenizer: Tokenizer | None = None,
    measure: LossFunction = next_token_loss,
) -> dict:
    """Loss, perplexity and accuracy over the validation rows, in all and per source.

    tokenizer: gives bits per byte too, which compares models of different vocabularies
    measure: the loss; of another kind than the model's own, the figures are what it counts
    """
    model = inner(model)
    model.eval()
    total = torch.zeros(4, dtype=torch.float64)
    losses = {}
    for name in data.names:
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in data.batches(name, micro_batch_size, world.rank, world.size):
            if tokenizer is not None:
                targets = batch["targets"]
                sums[3] += tokenizer.n_bytes(targets[targets != IGNORED].tolist())
            batch = {key: value.to(world.device) for key, value in batch.items()}
            with scaler.autocast():
                sums[:3] += on_cpu(measure(model, batch))
        sums = over_ranks(sums, world)
        losses[name] = float(sums[0] / sums[1].clamp(min=1))
        total += sums
    model.train()
    figures = {**means(total.tolist()), "sources": losses}
    if total[3]:
        figures["bpb"] = float(total[0] / math.log(2) / total[3])
    return figures


def samples(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], kind: str, n_tokens: int = 48
) -> list[tuple[str, str]]:
    """(prompt, reply) for each prompt that fits the context; the same draws every time.

    All processes call it. kind: "sft" asks in a dialogue, "pretrain" continues a text
    """
    ids = {
        prompt: tokenizer.render_prompt([{"role": "user", "content": prompt}])
        if kind == "sft"
        else tokenizer.encode(prompt, bos=True)
        for prompt in prompts
    }
    ids = {prompt: tokens for prompt, tokens in ids.items()
           if len(tokens) < model.config.max_seq_len}  # fmt: skip
    if not ids:
        return []
    plain = whole_model(model).eval()
    choice = SamplingConfig(max_new_tokens=n_tokens, seed=0)
    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        replies = generate(plain, list(ids.values()), choice, tokenizer.eos_id)
    plain.train()
    return [(prompt, tokenizer.decode(reply)) for prompt, reply in zip(ids, replies, strict=True)]


class Window:
    """Sums and time since the last logged step."""

    def __init__(
        self, device: torch.device, mfu_per_rate: float = 0.0, sums: list[float] | None = None
    ) -> None:
        """mfu_per_rate: the share of the device's rate that one token a second uses
        sums: those of steps before the run was stopped"""
        self._device, self._mfu_per_rate = device, mfu_per_rate
        self.sums = torch.tensor(sums or [0.0] * 4, dtype=torch.float64)
        self.seconds, self._tokens = 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leave out the time that has passed since the last step (evaluation, saving)."""
        self._clock = time.perf_counter()

    def add(self, sums: Tensor) -> None:
        """One step has ended."""
        self.sums += sums
        self._tokens += float(sums[3])
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def figures(self, tokens_seen: int) -> dict:
        """Means since the last call; starts anew."""
        rate = self._tokens / max(self.seconds, 1e-9)
        figures = {
            **means(self.sums.tolist()),
            "tokens": tokens_seen,
            "tokens_per_s": rate,
            "mfu": rate * self._mfu_per_rate,
            "mem_gb": memory_gb(self._device),
        }
        self.sums.zero_()
        self.seconds, self._tokens = 0.0, 0.0
        return figures
