"""Continuous batching beside serving one request at a time, with the 43M shape.

    python -m benchmarks.serve_speed                     about 2 minutes on two cores
    python -m benchmarks.serve_speed --many 16 --rounds 5

Random weights, sharp enough that the nucleus has the size of a trained model's. Each reply: a
prompt of 64 tokens that nobody shares, 128 new ones, top-p 0.9 at temperature 0.8; <eos> is
switched off. `one` lets the same requests in one after the other (a server without batching),
`many` all at once through the same engine; they take turns, and the ratio is the median of the
rounds'. `steps` times the parts of a round: what batching cannot share is the choice of a token.
The last line is JSON.
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch

from babyllama.config import parse, run
from babyllama.cpu.decoder import make_decoder
from babyllama.generate import Decoder, Weights
from babyllama.sampling import SamplingConfig
from benchmarks.peers import SHAPE_43M
from model import Transformer
from serve.engine import Engine, Job, Piece

SHARPNESS = 11  # as in decode_speed.py


@dataclass(frozen=True)
class ServeSpeedConfig:
    """What to measure.

    Args:
        weights: auto, float32 or int8
        many: replies at once
        rounds: how often both ways take their turn
        prompt: tokens of a prompt
        new: tokens of a reply
        greedy: take the likeliest token, which costs next to nothing
        threads: of the processor; 0: as torch sees fit
    """

    weights: Weights = "auto"
    many: int = 16
    rounds: int = 3
    prompt: int = 64
    new: int = 128
    greedy: bool = False
    threads: int = 0


class Pieces:
    """Stands for a tokenizer: every token is a letter, none ends a reply."""

    eos_id = -1

    def stream_decoder(self) -> "Pieces":
        return self

    def feed(self, token: int) -> str:
        return "x"


def timed(engine: Engine, jobs: list[Job], at_once: int) -> float:
    """Seconds until all jobs are written, so many of them being let in at a time."""
    for job in jobs:
        job.reply = type(job.reply)()
    started = time.perf_counter()
    for first in range(0, len(jobs), at_once):
        for job in jobs[first : first + at_once]:
            engine.add(job)
        while engine.step():
            pass
    return time.perf_counter() - started


def step_ms(decoder: Decoder, engine: Engine, rows: int, length: int) -> float:
    """Milliseconds of a model step with so many rows, the median of 20."""
    engine.slots.resize([], rows)
    engine.slots.starts = [engine.slots.length - length] * rows
    tokens, found = torch.full((rows,), 5), []
    with torch.inference_mode():
        for _ in range(21):
            cache = engine.slots.window(whole=engine.reads_whole)
            started = time.perf_counter()
            decoder.step(tokens, cache)
            found.append(1e3 * (time.perf_counter() - started))
    engine.slots.resize([], 0)
    return statistics.median(found[1:])


def main(cfg: ServeSpeedConfig) -> None:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = Transformer(SHAPE_43M).eval()
    with torch.no_grad():
        model.norm.weight *= SHARPNESS
    decoder = make_decoder(model, cfg.weights)
    engine = Engine(decoder, Pieces(), cfg.many, prefix_mb=0)
    temperature = 0.0 if cfg.greedy else 0.8
    sampling = SamplingConfig(max_new_tokens=cfg.new, temperature=temperature, top_p=0.9, seed=1)
    prompts = torch.randint(3, SHAPE_43M.vocab_size, (cfg.many, cfg.prompt)).tolist()

    def ignore(piece: Piece) -> None:
        pass

    jobs = [Job(prompt, sampling, ignore, number) for number, prompt in enumerate(prompts)]
    n_one = max(2, cfg.many // 4)  # a quarter of the requests says how fast the others would be
    timed(engine, jobs[:2], 2)
    rates: dict[str, list[float]] = {"one": [], "many": []}
    for _ in range(cfg.rounds):
        rates["one"].append(n_one * cfg.new / timed(engine, jobs[:n_one], 1))
        rates["many"].append(cfg.many * cfg.new / timed(engine, jobs, cfg.many))
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    steps = {rows: step_ms(decoder, engine, rows, cfg.prompt) for rows in (1, 4, cfg.many)}
    print(json.dumps({
        "weights": decoder.kind, "threads": torch.get_num_threads(), "many": cfg.many,
        "greedy": cfg.greedy,
        "tokens_per_s": {name: round(statistics.median(r), 1) for name, r in rates.items()},
        "ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios],
        "step_ms": {rows: round(ms, 2) for rows, ms in steps.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    run(main, parse(ServeSpeedConfig, __doc__))
