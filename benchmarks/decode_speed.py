"""Decoding speed of the 43M shape on this processor, beside transformers' generate.

    python -m benchmarks.decode_speed             about 7 minutes on two cores

One sequence: a prompt of 64 tokens, 128 new ones, top-p 0.9 at temperature 0.8 for both, in turn.
Evaluation: 200 abstracts (random ids; lengths as in CSL, mean 208 characters), 32 new tokens,
greedy: ours in batches, ours one at a time, transformers one at a time. Same random weights for
all; <eos> is switched off so that every reply has the same length. The last line is JSON.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from babyllama.cli import parse, run
from babyllama.generate import SamplingConfig, generate, stream
from benchmarks.peers import SHAPE_43M, hf_copy
from model import Transformer

NO_EOS = -1

# Random weights give nearly equal probabilities. With this factor on the logits the nucleus has
# some 60 tokens, as a trained model's, instead of 50,000.
SHARPNESS = 11


@dataclass(frozen=True)
class DecodeConfig:
    """What to measure.

    Args:
        rounds: how often each contestant decodes one sequence, in turn
        abstracts: number of prompts of the evaluation
        batch_size: prompts that ours decodes at once
        new_tokens: length of each reply of the evaluation
    """

    rounds: int = 5
    abstracts: int = 200
    batch_size: int = 50
    new_tokens: int = 32


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def hf_generate(peer: torch.nn.Module, prompt: list[int], n: int, **sampling: object) -> int:
    """Let transformers write exactly n tokens; returns how many came."""
    ids = torch.tensor([prompt])
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
        pad_token_id=0, **sampling,
    )  # fmt: skip
    return out.shape[1] - len(prompt)


def one_sequence(model: Transformer, peer: torch.nn.Module, rounds: int) -> dict:
    """Tokens/s of one reply, prompt included in the time, ours and transformers' in turn."""
    prompt, n = torch.randint(3, 65_000, (64,)).tolist(), 128
    sampling = SamplingConfig(max_new_tokens=n, temperature=0.8, top_p=0.9)
    ours, theirs = [], []
    for turn in range(rounds + 1):
        a = seconds_of(lambda: list(stream(model, prompt, sampling, NO_EOS)))
        b = seconds_of(
            lambda: hf_generate(
                peer, prompt, n, do_sample=True, temperature=0.8, top_p=0.9, top_k=0
            )
        )
        if turn:  # the first round warms up
            ours.append(n / a)
            theirs.append(n / b)
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours_tokens_per_s": statistics.median(ours),
        "hf_tokens_per_s": statistics.median(theirs),
        "ratio": statistics.median(pairs),
    }


def evaluation(model: Transformer, peer: torch.nn.Module, cfg: DecodeConfig) -> dict:
    """Seconds for all abstracts, three ways."""
    lengths = (torch.randn(cfg.abstracts) * 70 + 220).clamp(60, 440).int().tolist()
    prompts = [torch.randint(3, 65_000, (n,)).tolist() for n in sorted(lengths)]
    sampling = SamplingConfig(max_new_tokens=cfg.new_tokens, temperature=0)
    starts = range(0, len(prompts), cfg.batch_size)
    batches = [prompts[i : i + cfg.batch_size] for i in starts]
    seconds = {
        "ours_batched_s": seconds_of(
            lambda: [generate(model, batch, sampling, NO_EOS) for batch in batches]
        ),
        "ours_one_by_one_s": seconds_of(
            lambda: [generate(model, [prompt], sampling, NO_EOS) for prompt in prompts]
        ),
        "hf_one_by_one_s": seconds_of(
            lambda: [hf_generate(peer, p, cfg.new_tokens, do_sample=False) for p in prompts]
        ),
    }
    batched = seconds["ours_batched_s"]
    return {
        **seconds,
        "over_hf": seconds["hf_one_by_one_s"] / batched,
        "over_ours_one_by_one": seconds["ours_one_by_one_s"] / batched,
    }


def main(cfg: DecodeConfig) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    model = Transformer(SHAPE_43M).eval()
    with torch.no_grad():
        model.norm.weight *= SHARPNESS
    peer = hf_copy(model)
    with torch.inference_mode():
        one = one_sequence(model, peer, cfg.rounds)
        print("one sequence", one, flush=True)
        many = evaluation(model, peer, cfg)
    print("evaluation", many)
    print(json.dumps({"one_sequence": one, "evaluation": many}))


if __name__ == "__main__":
    run(main, parse(DecodeConfig, __doc__))
