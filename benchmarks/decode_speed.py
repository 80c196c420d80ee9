"""Decoding speed of the 43M shape on this processor, beside transformers' generate.

    python -m benchmarks.decode_speed                          about 4 minutes on two cores
    python -m benchmarks.decode_speed --llama                  and llama.cpp, a minute more

All contestants have the same random weights and take turns, so that what else the machine does
meets all of them; a ratio is the median of the ratios of the rounds. One sequence: a prompt of 64
tokens, 128 new ones, top-p 0.9 at temperature 0.8, or greedy. First token: of a prompt of 512
tokens, less one for the reply. <eos> is switched off so that every reply has the same length. The
last line is JSON.
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
    seconds: dict[str, list[float]], n_tokens: int, base: str
) -> dict[str, dict[str, float]]:
    """Of each work: tokens/s, the best of them, and how many times those of `base`, and of the
    fastest llama.cpp where there is one."""
    llamas = [name for name in seconds if name.startswith(LLAMA)]
    bases = {f"over {base}": base}
    if llamas:
        bases[f"over {LLAMA}"] = min(llamas, key=lambda name: statistics.median(seconds[name]))
    return {
        name: {"tokens_per_s": n_tokens / statistics.median(took), "best": n_tokens / min(took)}
        | {
            key: statistics.median(a / b for a, b in zip(seconds[other], took, strict=True))
            for key, other in bases.items()
        }
        for name, took in seconds.items()
    }


def hf_generate(peer: torch.nn.Module, prompt: list[int], n: int, greedy: bool) -> None:
    """Let transformers write exactly n tokens."""
    ids, drawn = torch.tensor([prompt]), {"temperature": 0.8, "top_p": 0.9, "top_k": 0}
    peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
        pad_token_id=0, do_sample=not greedy, **({} if greedy else drawn),
    )  # fmt: skip


def one_reply(
    decoders: dict[str, Decoder],
    peer: torch.nn.Module,
    llamas: dict[str, LlamaCpp],
    rounds: int,
    length: int,
    n: int,
    greedy: bool,
) -> dict[str, dict[str, float]]:
    """One sequence of all contestants: n tokens behind a prompt of some length."""
    prompt = torch.randint(3, SHAPE_43M.vocab_size, (length,)).tolist()
    sampling = SamplingConfig(max_new_tokens=n, temperature=0 if greedy else 0.8, top_p=0.9)
    works: dict[str, Callable[[], object]] = {
        "transformers": partial(hf_generate, peer, prompt, n, greedy)
    }
    for name, decoder in decoders.items():
        works[name] = partial(generate, decoder, [prompt], sampling, NO_EOS)
    for name, llama in llamas.items():
        works[name] = partial(llama.generate, prompt, n, greedy)
    seconds = in_turn(works, rounds)
    found = compare(seconds, n, "transformers")
    return {name: {"ms": 1e3 * statistics.median(seconds[name]), **found[name]} for name in works}


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
    with torch.inference_mode():
        llamas = llama_cpps(model) if cfg.llama else {}
        for title, *how in (
            ("one_reply", 64, 128, False),
            ("one_greedy_reply", 64, 128, True),
            ("first_token", SHAPE_43M.max_seq_len - 1, 1, True),
        ):
            found = result[title] = one_reply(decoders, peer, llamas, cfg.rounds, *how)
            print(title)
            for name, row in found.items():
                cells = "  ".join(f"{key} {value:,.2f}" for key, value in row.items())
                print(f"  {name:<16}{cells}")
    print(json.dumps({"threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    run(main, parse(DecodeConfig, __doc__))
