"""Pictures a second of the encoders on one core, beside torch's bare convolutions.

    OMP_NUM_THREADS=1 python -m benchmarks.encoder_speed          half a minute

The bare ones are the network's own convolutions, with their weights and the shapes that reach
them, called one after the other without norms, activations and attention: what torch's kernels
leave at best. Both take turns; a figure is the median of the rounds. The last line is JSON.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from babyllama.config import parse, run
from vqa.encoders import EncoderConfig, make_encoder
from vqa.images import normalise

NAMES = ("efficientvit_b0", "efficientnet_lite0")
SIZES = (128, 192)


@dataclass(frozen=True)
class EncoderSpeedConfig:
    """What to measure.

    Args:
        rounds: how often each takes its turn
        batch: pictures at once
        threads: of the processor
    """

    rounds: int = 7
    batch: int = 16
    threads: int = 1


def convolutions(encoder: nn.Module, see: Callable[[], object]) -> Callable[[], None]:
    """A function that calls every convolution that `see` calls, on inputs of the same shapes."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        part.register_forward_pre_hook(lambda part, given: calls.append((part, given[0].clone())))
        for part in encoder.modules()
        if isinstance(part, nn.Conv2d)
    ]
    see()
    for hook in hooks:
        hook.remove()

    def bare() -> None:
        for part, given in calls:
            part(given)

    return bare


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, size: int, cfg: EncoderSpeedConfig) -> dict[str, float]:
    """Pictures a second of one network at one size."""
    config = EncoderConfig(name=name, size=size)
    encoder = make_encoder(config)
    pixels = torch.randint(0, 256, (cfg.batch, 1, 3, size, size), dtype=torch.uint8)

    def see() -> torch.Tensor:
        return encoder(normalise(pixels, config.normalisation))

    bare = convolutions(encoder, see)
    times = [(seconds_of(see), seconds_of(bare)) for _ in range(cfg.rounds + 1)][1:]
    ours, theirs = (statistics.median(part) for part in zip(*times, strict=True))
    return {
        "pictures_per_s": cfg.batch / ours,
        "bare_pictures_per_s": cfg.batch / theirs,
        "share": statistics.median(b / a for a, b in times),
    }


def main(cfg: EncoderSpeedConfig) -> None:
    torch.set_num_threads(cfg.threads)
    found = {}
    with torch.inference_mode():
        for name in NAMES:
            for size in SIZES:
                found[f"{name} {size}"] = figures = measure(name, size, cfg)
                print(f"{name:<20} {size:>4}  {figures['pictures_per_s']:7.1f} pictures/s, bare "
                      f"convolutions {figures['bare_pictures_per_s']:7.1f}, share "
                      f"{figures['share']:.0%}", flush=True)  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    run(main, parse(EncoderSpeedConfig, __doc__))
