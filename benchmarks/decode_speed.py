"""Decoding speed of the 43M shape on this processor, beside transformers' generate.

    python -m benchmarks.decode_speed                          about 4 minutes on two cores
    python -m benchmarks.decode_speed --llama                  and llama.cpp, a minute more

All contestants have the same random weights and take turns, so that what else the machine does
meets all of them; a ratio is the median of the ratios of the rounds. One sequence: a prompt of 64
tokens, 128 new ones, top-p 0.9 at temperature 0.8. Many: 16 such prompts at once. First token: of
a prompt of 512 tokens, less one for the reply. <eos> is switched off so that every reply has the
same length. The last line is JSON.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from babyllama.config import parse, run
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Decoder
from babyllama.generate import generate
from babyllama.sampling import SamplingConfig
from benchmarks.peers import SHAPE_43M, LlamaCpp, hf_copy, write_gguf
from model import Transformer

NO_EOS = -1
MANY = 16
LLAMA = "llama.cpp"

# Random weights give nearly equal probabilities. With this factor on the logits the nucleus has
# some 60 tokens, as a trained model's, instead of 50,000.
SHARPNESS = 11


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of a measurement.

    Args:
        rounds: how often each contestant takes its turn
        llama: compare with llama.cpp (f16 and q8_0, one thread and more); needs llama-cpp-python
    """

    rounds: int = 5
    llama: bool = False


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            time.sleep(0.02)  # the threads of the one before may still be waiting for work
            started = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(
    seconds: dict[str, list[float]], tokens: dict[str, int], base: str
) -> dict[str, dict[str, float]]:
    """Of each work: tokens/s, the best of them, and how many times those of `base`, and of the
    fastest llama.cpp where there is one."""
    rates = {name: [tokens[name] / s for s in took] for name, took in seconds.items()}
    llamas = [name for name in rates if name.startswith(LLAMA)]
    bases = {f"over {base}": base}
    if llamas:
        bases[f"over {LLAMA}"] = max(llamas, key=lambda name: statistics.median(rates[name]))
    return {
        name: {"tokens_per_s": statistics.median(found), "best": max(found)}
        | {
            key: statistics.median(a / b for a, b in zip(found, rates[other], strict=True))
            for key, other in bases.items()
        }
        for name, found in rates.items()
    }


def hf_generate(peer: torch.nn.Module, prompt: list[int], n: int, **sampling: object) -> int:
    """Let transformers write exactly n tokens; returns how many came."""
    ids = torch.tensor([prompt])
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
        pad_token_id=0, **sampling,
    )  # fmt: skip
    return out.shape[1] - len(prompt)


def random_prompts(n: int, length: int) -> list[list[int]]:
    return torch.randint(3, SHAPE_43M.vocab_size, (n, length)).tolist()


def one_reply(
    decoders: dict[str, Decoder],
    peer: torch.nn.Module,
    llamas: dict[str, LlamaCpp],
    rounds: int,
    greedy: bool,
) -> dict[str, dict[str, float]]:
    """One sequence of all contestants."""
    (prompt,), n = random_prompts(1, 64), 128
    sampling = SamplingConfig(max_new_tokens=n, temperature=0 if greedy else 0.8, top_p=0.9)
    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 0}
    theirs = {"do_sample": False} if greedy else {"do_sample": True, **drawn}
    works: dict[str, Callable[[], object]] = {
        "transformers": lambda: hf_generate(peer, prompt, n, **theirs)
    }
    for name, decoder in decoders.items():
        works[name] = partial(generate, decoder, [prompt], sampling, NO_EOS)
    for name, llama in llamas.items():
        works[name] = partial(llama.generate, prompt, n, greedy)
    return compare(in_turn(works, rounds), dict.fromkeys(works, n), "transformers")


def many_replies(decoders: dict[str, Decoder], rounds: int) -> dict[str, dict[str, float]]:
    """One sequence and many at once, of ours."""
    prompts, n = random_prompts(MANY, 64), 128
    sampling = SamplingConfig(max_new_tokens=n, temperature=0.8, top_p=0.9)
    found = {}
    for name, decoder in decoders.items():
        works = {
            name if count == 1 else f"{name} x {count}": partial(
                generate, decoder, prompts[:count], sampling, NO_EOS
            )
            for count in (1, MANY)
        }
        tokens = dict(zip(works, (n, MANY * n), strict=True))
        found |= compare(in_turn(works, rounds), tokens, name)
    return found


def first_token(
    decoders: dict[str, Decoder],
    peer: torch.nn.Module,
    llamas: dict[str, LlamaCpp],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Time until the first token behind a long prompt."""
    (prompt,) = random_prompts(1, SHAPE_43M.max_seq_len - 1)
    sampling = SamplingConfig(max_new_tokens=1, temperature=0)
    works: dict[str, Callable[[], object]] = {
        "transformers": lambda: hf_generate(peer, prompt, 1, do_sample=False)
    }
    for name, decoder in decoders.items():
        works[name] = partial(generate, decoder, [prompt], sampling, NO_EOS)
    for name, llama in llamas.items():
        works[name] = partial(llama.generate, prompt, 1, True)
    seconds = in_turn(works, rounds)
    found = compare(seconds, dict.fromkeys(works, len(prompt)), "transformers")
    return {name: {"ms": 1e3 * statistics.median(seconds[name]), **found[name]} for name in works}


def show(title: str, lines: dict[str, dict[str, float]]) -> None:
    print(title)
    for name, found in lines.items():
        print(f"  {name:<16}" + "  ".join(f"{key} {value:,.2f}" for key, value in found.items()))


def llama_cpps(model: Transformer) -> dict[str, LlamaCpp]:
    """llama.cpp with each type of weights and each number of threads."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for kind in ("f16", "q8_0"):
            file = Path(place) / f"{kind}.gguf"
            write_gguf(model, file, kind)
            for threads in range(1, torch.get_num_threads() + 1):
                found[f"{LLAMA} {kind} {threads}"] = LlamaCpp(file, threads)
    return found


def main(cfg: DecodeConfig) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    model = Transformer(SHAPE_43M).eval()
    with torch.no_grad():
        model.norm.weight *= SHARPNESS
    peer = hf_copy(model)
    decoders = {weights: make_decoder(model, weights) for weights in ("float32", "int8")}
    result: dict[str, dict] = {}

    def record(title: str, found: dict[str, dict[str, float]]) -> None:
        result[title] = found
        show(title, found)

    with torch.inference_mode():
        llamas = llama_cpps(model) if cfg.llama else {}
        record("one_reply", one_reply(decoders, peer, llamas, cfg.rounds, greedy=False))
        record("one_greedy_reply", one_reply(decoders, peer, llamas, cfg.rounds, greedy=True))
        record("many_replies", many_replies(decoders, cfg.rounds))
        record("first_token", first_token(decoders, peer, llamas, cfg.rounds))
    print(json.dumps({"threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    run(main, parse(DecodeConfig, __doc__))
