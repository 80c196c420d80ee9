"""From a picture's bytes to the squares that an encoder sees, by threads that work ahead.

Pillow lets other threads run while it decodes and resizes, so threads are workers enough.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from babyllama import images
from vqa.encoder import EncoderConfig


class Wanted(NamedTuple):
    """A picture as a row wants it: of which set, which one, with which random changes (0: none)."""

    source: int
    number: int
    chance: int = 0


def prepared(data: bytes, name: str, config: EncoderConfig, chance: int = 0) -> Tensor:
    """The squares (squares, 3, S, S) uint8 of a picture, with random changes of this seed."""
    image = images.decode(data, name, least=config.size * config.tiles)
    if chance:
        rng = np.random.default_rng(chance)
        if rng.random() < 0.5:
            image = image.transpose(0)  # left and right change places
        width, height = image.size
        share = rng.uniform(0.75, 1.0)
        left, top = (int(rng.integers(0, side - int(side * share) + 1)) for side in image.size)
        image = image.crop((left, top, left + max(1, int(width * share)),
                            top + max(1, int(height * share))))  # fmt: skip
    return images.squares(image, config.size, config.tiles)


class Loader:
    """Gives the tensor of each wanted picture; those asked for early are ready in time."""

    def __init__(self, read: Callable[[Wanted], Tensor], n_workers: int) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(n_workers)
        self._coming: dict[Wanted, Future] = {}

    def ask(self, wanted: Sequence[Wanted]) -> None:
        for one in wanted:
            if one not in self._coming:
                self._coming[one] = self._pool.submit(self._read, one)

    def take(self, wanted: Sequence[Wanted]) -> Tensor:
        """(N, …): one tensor a picture, in order."""
        self.ask(wanted)
        return torch.stack([self._coming[one].result() for one in wanted])

    def forget(self, wanted: Sequence[Wanted]) -> None:
        for one in wanted:
            self._coming.pop(one, None)
