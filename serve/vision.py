"""Continuous batching for models that see: serve/engine.py, and an image to each reply.

A job's prompt holds the positions of its image (model.py), and `job.image` what the language
model gets of it. A prompt is read with its own image, and a step gives each row the one that it
looks at. Equal ids may stand for unlike images, so no beginning of a prompt is kept for another.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from babyllama.checkpoint import Loaded
from babyllama.decoder import Decoder
from model import KVCache
from serve.engine import Engine, Job


def image_tools() -> tuple[ModuleType, ModuleType, ModuleType]:
    """vqa.chat, vqa.images and vqa.model: the one place where the server needs that folder."""
    from vqa import chat, images, model

    return chat, images, model


class Eyes:
    """What a server needs of a model that sees, beside its engine.

    loaded: as vqa.model.load gives it
    n_positions: tokens of a prompt that an image takes
    """

    def __init__(self, loaded: Loaded) -> None:
        self._chat, self._images, self._model = image_tools()
        self._loaded, self.n_positions = loaded, loaded.model.n_positions
        # The largest image takes 300 MB while it is read, and what a thread gave back is kept for
        # that thread: so all are read by this one.
        self._reader = ThreadPoolExecutor(1, "eyes")

    def look(self, urls: Sequence[str]) -> Tensor:
        """What the model gets of the one image (1, M, D), a data URL; errors as answer.look."""
        given = [self._images.from_data_url(url) for url in urls]
        return self._reader.submit(self._chat.look, self._loaded, given).result()

    def laid(self, ids: Sequence[int]) -> list[int]:
        """A rendered dialogue with the positions of its image."""
        return self._model.with_image(ids, 0, self.n_positions)


class ImageEngine(Engine):
    """As Engine; jobs have an image."""

    def __init__(self, loaded: Loaded, n_slots: int) -> None:
        self._model = loaded.model
        nothing = torch.zeros(1, 1, loaded.model.config.dim)
        decoder = loaded.model.decoder(nothing)
        # As a partial its step is given the columns that count, not the whole cache.
        decoder = replace(decoder, step=partial(decoder.step), reason="sees images")
        super().__init__(decoder, loaded.tokenizer, n_slots, prefix_mb=0)

    def _decoder_for(self, job: Job) -> Decoder:
        own = self._model.decoder(job.image)

        def read(tokens: Tensor, cache: KVCache) -> Tensor:
            with self._model.looking_at(job.image):
                return own.read(tokens, cache)

        return replace(own, reader=read)

    def _write(self) -> None:
        """Free rows look at the image of another one; nobody reads what they say."""
        given = [row.job.image for row in self.rows if row]
        if given:
            seen = [row.job.image if row else given[0] for row in self.rows]
            with self._model.looking_at(torch.cat(seen)):
                super()._write()
