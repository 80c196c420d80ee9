"""Rows about images as batches: the mixture and the order are babyllama/data.py's.

A row is a dialogue of a token file of kind "vqa", whose first piece is the name of its image.
Images come from packed sets (pack.py), decoded by threads (Pillow lets others run meanwhile); or,
where the encoder is frozen, as features that it gave once. Rows do not share sequences.

What a frozen encoder sees in each image of a set is kept on the disk:

    data/pictures/<set>/features-<key>.npy    (images, places, sum of widths) float16

The key stands for the encoder's weights and settings and for the set's images.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from babyllama.config import atomic_write, from_repo, shown
from babyllama.data import Data, Mixture, TrainData, ValData, collate
from babyllama.errors import ConfigError, DataError, require
from babyllama.sources import Dialogues, SourceConfig, supervised, token_directory
from babyllama.token_file import TokenFile
from model import IGNORED
from tokenizer import Tokenizer
from vqa import images
from vqa.encoders import Encoder, EncoderConfig
from vqa.images import normalise
from vqa.model import with_image
from vqa.pack import PackedImages


class Wanted(NamedTuple):
    """An image as a row wants it: of which set, which one."""

    source: int
    number: int


def prepared(data: bytes | Path, name: str, config: EncoderConfig) -> Tensor:
    """The squares (squares, 3, S, S) uint8 of an image."""
    image = images.decode(data, name, least=config.size * config.tiles)
    return images.squares(image, config.size, config.tiles)


BATCH = 16


def key_of(encoder: Encoder, packed: PackedImages) -> str:
    """Another one where weights, settings or images are others."""
    digest = hashlib.sha256(repr(replace(encoder.config, weights=None)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in sorted(packed.place.glob("pictures-*.tar")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def features_of(encoder: Encoder, packed: PackedImages, device: torch.device) -> np.ndarray:
    """The features of all images, read from the disk; computed first where they are not there."""
    path = packed.place / f"features-{key_of(encoder, packed)}.npy"
    if not path.is_file():
        encoder = encoder.eval().to(device)
        shape = (len(packed), encoder.config.n_places, sum(encoder.widths))
        with atomic_write(path, unique=True) as temporary:
            out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            done = 0
            for part in computed(encoder, packed, range(len(packed)), device):
                out[done : done + len(part)] = part.astype(np.float16)
                done += len(part)
            out.flush()
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def computed(
    encoder: Encoder, packed: PackedImages, numbers: Sequence[int], device: torch.device
) -> Iterator[np.ndarray]:
    """The features (n, places, C) float32 of images, some at a time."""
    config = encoder.config
    for first in tqdm(range(0, len(numbers), BATCH), f"see {packed.place.name}", disable=None):
        part = numbers[first : first + BATCH]
        squares = [prepared(packed.read(n), packed.names[n], config) for n in part]
        seen = encoder(normalise(torch.stack(squares).to(device), config.normalisation))
        yield seen.float().cpu().numpy()


@dataclass(frozen=True)
class VqaDataConfig:
    """Training data.

    Args:
        sources: the mixture: sets in data/tokens/<tokenizer> with their images in data/pictures
        pictures: where the packed images lie
        max_val_rows: validation takes the first rows of each source, at most this many
        cache_features: a frozen encoder sees each image once; its features stay on the disk
        workers: threads that decode images
    """

    sources: tuple[SourceConfig, ...] = ()
    pictures: Path = Path("data/pictures")
    max_val_rows: int = 256
    cache_features: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        names = ("max_val_rows", "workers")
        require("data", self, {name: ("1 or more", getattr(self, name) >= 1) for name in names})


class ImageRow(NamedTuple):
    tokens: np.ndarray  # (n,) int64, with the positions of a first image
    targets: np.ndarray  # (n,) int64
    image: Wanted


class ImageRows(Dialogues):
    """A source. Dialogues that are too long lose whole turns from their end; those whose image
    is not there, or whose first answer does not fit, are dropped. All are counted.

    number: of the source among those of the mixture
    """

    def __init__(
        self,
        name: str,
        number: int,
        split: str,
        tokenizer: Tokenizer,
        packed: PackedImages,
        max_seq_len: int,
        n_positions: int,
    ) -> None:
        self.number, self.packed, self._n_positions = number, packed, n_positions
        files = token_files(name, split, tokenizer)
        super().__init__(name, files, tokenizer, max_seq_len - n_positions)
        if not len(self):
            raise DataError(f"{name}: no row of {split} can be used {self.dropped}")

    def _fitting(self, max_seq_len: int) -> list[np.ndarray]:
        self._images: list[np.ndarray] = []  # of each file the image of each row, or -1
        fitting = super()._fitting(max_seq_len)
        self.dropped["image_missing"] = sum(int((own < 0).sum()) for own in self._images)
        return [np.maximum(n_pieces, 0) for n_pieces in fitting]

    def _pieces(self, file: TokenFile, max_seq_len: int) -> np.ndarray:
        names = (file.pieces(row)[0][1].tolist() for row in range(file.n_docs))
        numbers = [self.packed.number.get(self._tokenizer.decode(name), -1) for name in names]
        self._images.append(np.array(numbers, dtype=np.int64))
        return np.where(self._images[-1] < 0, -1, super()._pieces(file, max_seq_len))

    def _messages(self, number: int) -> tuple[int, list[tuple[str, list[int]]]]:
        file, row, n_pieces = self._rows[number].tolist()
        pieces = self.files[file].pieces(row)[1:n_pieces]
        return int(self._images[file][row]), [(role, ids.tolist()) for role, ids in pieces]

    def messages(self, number: int) -> tuple[int, list[dict]]:
        """The image's number and the dialogue as texts."""
        image, pieces = self._messages(number)
        decode = self._tokenizer.decode
        return image, [{"role": role, "content": decode(ids)} for role, ids in pieces]

    def row(self, number: int, _rng: np.random.Generator) -> ImageRow:  # type: ignore[override]
        """A row in three parts, which Batches takes."""
        image, pieces = self._messages(number)
        messages = [{"role": role, "content": [ids]} for role, ids in pieces]
        tokens, targets = supervised(self._tokenizer, messages)
        n = self._n_positions
        tokens = np.array(with_image(tokens.tolist(), 0, n), dtype=np.int64)
        targets = np.concatenate((np.full(n, IGNORED), targets))
        return ImageRow(tokens, targets, Wanted(self.number, image))


def token_files(name: str, split: str, tokenizer: Tokenizer) -> list[TokenFile]:
    """The token files of a part of a set.

    raises: DataError with the commands that make them, where there are none
    """
    where = token_directory(name, tokenizer)
    files = [
        TokenFile(stem, tokenizer.fingerprint) for stem in sorted(where.glob(f"{split}-*.idx"))
    ]
    if not files or any(file.kind != "vqa" for file in files):
        found = files[0].kind if files else "none"
        raise DataError(
            f"{shown(where)}: wanted token files {split}-*.idx of kind vqa, found {found}; make "
            f"them: python -m data_process.run vqa --name {where.name} --raw DIRECTORY "
            f"--tokenizer {shown(tokenizer.path)}, then python -m vqa.pack {where.name}"
        )
    return files


class Room(NamedTuple):
    """Longest sequence, id of padding, positions of an image."""

    max_seq_len: int
    pad_id: int
    n_positions: int


class Batches:
    """Makes batches of rows, whose images several threads read.

    read: the tensor of an image
    key: what the model calls it, pixels or features
    """

    def __init__(
        self, read: Callable[[Wanted], Tensor], key: str, n_workers: int, room: Room
    ) -> None:
        self._read, self._key, self._room = read, key, room
        self._threads = ThreadPoolExecutor(n_workers)

    def of(
        self, rows: list, micro_batch_size: int, rank: int, world_size: int
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches, as many as every rank gets: one that would run out repeats a
        row without its targets. With shares of a model, all ranks must call it equally often."""
        mine = rows[rank::world_size]
        missing = -(-len(rows) // world_size) - len(mine)
        blank = rows[0]._replace(targets=np.full_like(rows[0].targets, IGNORED))
        mine = mine + [blank] * missing
        starts = range(0, len(mine), micro_batch_size)
        return [self._batch(mine[start : start + micro_batch_size]) for start in starts]

    def _batch(self, rows: list[ImageRow]) -> dict[str, Tensor]:
        sequences = []
        for n, row in enumerate(rows):
            moved = row.tokens - n * self._room.n_positions
            sequences.append([(np.where(row.tokens < 0, moved, row.tokens), row.targets)])
        batch = collate(sequences, self._room.pad_id)
        batch["image_of"] = torch.arange(len(rows))
        read = self._threads.map(self._read, (row.image for row in rows))
        batch[self._key] = torch.stack(list(read))
        return batch


class VqaTrainData(TrainData):
    """The training rows of a mixture, step by step, with their images."""

    def __init__(self, mixture: Mixture, batch_size: int, room: Room, batches: Batches) -> None:
        super().__init__(mixture, batch_size, room.max_seq_len, room.pad_id)
        self._batches = batches

    def batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step, as many as every rank gets."""
        return self._batches.of(self.rows(step), micro_batch_size, rank, world_size)


class VqaValData(ValData):
    """The first validation rows of each source."""

    def __init__(self, sources: list[ImageRows], max_rows: int, batches: Batches) -> None:
        self._batches = batches
        self._sequences = {
            s.name: [s.row(i, np.random.default_rng(0)) for i in range(min(max_rows, len(s)))]
            for s in sources
        }

    def batches(
        self, name: str, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's part of a source's validation rows."""
        return self._batches.of(self._sequences[name], micro_batch_size, rank, world_size)


def open_images(config: VqaDataConfig) -> list[PackedImages]:
    """The packed images of each source; errors as PackedImages."""
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one set of rows about images")
    return [PackedImages(from_repo(config.pictures) / Path(s.name).name) for s in config.sources]


def open_vqa_data(
    config: VqaDataConfig,
    tokenizer: Tokenizer,
    room: Room,
    order: Any,
    packed: list[PackedImages],
    encoder: EncoderConfig,
    features: list[np.ndarray] | None = None,
) -> Data:
    """Training and validation data of a run.

    features: of each source's images, where they were computed before
    raises: DataError or ConfigError where a source cannot be used
    """

    def opened(split: str) -> list[ImageRows]:
        return [
            ImageRows(s.name, n, split, tokenizer, packed[n], room.max_seq_len, room.n_positions)
            for n, s in enumerate(config.sources)
        ]

    def read(one: Wanted) -> Tensor:
        if features is not None:
            return torch.from_numpy(np.array(features[one.source][one.number]))
        held = packed[one.source]
        return prepared(held.read(one.number), held.names[one.number], encoder)

    key = "pixels" if features is None else "features"
    batches = Batches(read, key, config.workers, room)
    weights = [source.weight for source in config.sources]
    mixture = Mixture(opened("train"), weights, order.seed)
    return Data(
        VqaTrainData(mixture, order.batch_size, room, batches),
        VqaValData(opened("val"), config.max_val_rows, batches),
    )
