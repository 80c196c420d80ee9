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
Write = Callable[[list[int], int, bool], object]  # a reply to a prompt, of n tokens, greedy or not

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


def compare(seconds: dict[str, list[float]], n_tokens: int) -> dict[str, dict[str, float]]:
    """Of each work: ms, tokens/s, the best of them, and how many times those of transformers, and
    of the fastest llama.cpp where there is one."""
    bases = {"transformers": "transformers"}
    if llamas := [name for name in seconds if name.startswith(LLAMA)]:
        bases[LLAMA] = min(llamas, key=lambda name: statistics.median(seconds[name]))
    found: dict[str, dict[str, float]] = {}
    for name, took in seconds.items():
        usual = statistics.median(took)
        found[name] = {"ms": 1e3 * usual, "tokens_per_s": n_tokens / usual}
        found[name]["best"] = n_tokens / min(took)
        for title, base in bases.items():
            ratios = (a / b for a, b in zip(seconds[base], took, strict=True))
            found[name][f"over {title}"] = statistics.median(ratios)
    return found


def our_generate(decoder: Decoder, prompt: list[int], n: int, greedy: bool) -> None:
    """Write exactly n tokens."""
    sampling = SamplingConfig(max_new_tokens=n, temperature=0 if greedy else 0.8, top_p=0.9)
    generate(decoder, [prompt], sampling, NO_EOS)


def hf_generate(peer: torch.nn.Module, prompt: list[int], n: int, greedy: bool) -> None:
    """Let transformers write exactly n tokens."""
    ids, drawn = torch.tensor([prompt]), {"temperature": 0.8, "top_p": 0.9, "top_k": 0}
    peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
        pad_token_id=0, do_sample=not greedy, **({} if greedy else drawn),
    )  # fmt: skip


def llama_cpps(model: Transformer) -> dict[str, Write]:
    """llama.cpp with each type of weights and each number of threads."""
    found: dict[str, Write] = {}
    with tempfile.TemporaryDirectory() as place:
        for kind in ("f16", "q8_0"):
            file = Path(place) / f"{kind}.gguf"
            write_gguf(model, file, kind)
            for threads in range(1, torch.get_num_threads() + 1):
                found[f"{LLAMA} {kind} {threads}"] = LlamaCpp(file, threads).generate
    return found


def main(cfg: DecodeConfig) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    model = Transformer(SHAPE_43M).eval()
    with torch.no_grad():
        model.norm.weight *= SHARPNESS
    contestants: dict[str, Write] = {"transformers": partial(hf_generate, hf_copy(model))}
    for weights in ("float32", "int8"):
        contestants[weights] = partial(our_generate, make_decoder(model, weights))
    result: dict[str, dict] = {}
    with torch.inference_mode():
        contestants |= llama_cpps(model) if cfg.llama else {}
        for title, length, n, greedy in (
            ("one_reply", 64, 128, False),
            ("one_greedy_reply", 64, 128, True),
            ("first_token", SHAPE_43M.max_seq_len - 1, 1, True),
        ):
            prompt = torch.randint(3, SHAPE_43M.vocab_size, (length,)).tolist()
            works = {name: partial(write, prompt, n, greedy) for name, write in contestants.items()}
            found = result[title] = compare(in_turn(works, cfg.rounds), n)
            print(title)
            for name, row in found.items():
                cells = "  ".join(f"{key} {value:,.2f}" for key, value in row.items())
                print(f"  {name:<16}{cells}")
    print(json.dumps({"threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    run(main, parse(DecodeConfig, __doc__))
