"""Rows about pictures as batches: the mixture and the order are babyllama/data.py's.

A row is a dialogue of a token file of kind "vqa", whose first piece is the name of its picture.
Pictures come from packed sets (pictures.py), decoded by threads a step ahead; or, where the
encoder is frozen, as features that it gave once. Rows do not share sequences.

Pillow lets other threads run while it decodes and resizes, so threads are workers enough.

What a frozen encoder sees in each picture of a set is kept on the disk:

    data/pictures/<set>/features-<key>.npy    (pictures, places, sum of widths) float16

The key stands for the encoder's weights and settings and for the set's pictures.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from babyllama.config import atomic_write, from_repo, shown
from babyllama.data import Data, Mixture, Order, TrainData, ValData, collate
from babyllama.errors import ConfigError, DataError
from babyllama.sources import SourceConfig
from babyllama.token_file import TokenFile
from model import IGNORED
from tokenizer import Tokenizer
from vqa import images
from vqa.encoders import Encoder, EncoderConfig
from vqa.images import normalise
from vqa.model import with_picture
from vqa.pack import Pictures


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


BATCH = 16


def key_of(encoder: Encoder, pictures: Pictures) -> str:
    """Another one where weights, settings or pictures are others."""
    digest = hashlib.sha256(repr(replace(encoder.config, weights=None)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in sorted(pictures.place.glob("pictures-*.tar")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def features_of(encoder: Encoder, pictures: Pictures, device: torch.device) -> np.ndarray:
    """The features of all pictures, read from the disk; computed first where they are not there."""
    path = pictures.place / f"features-{key_of(encoder, pictures)}.npy"
    if not path.is_file():
        _compute(encoder, pictures, path, device)
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def _compute(encoder: Encoder, pictures: Pictures, path: Path, device: torch.device) -> None:
    config, encoder = encoder.config, encoder.eval().to(device)
    shape = (len(pictures), config.n_places, sum(encoder.widths))
    with atomic_write(path, unique=True) as temporary:
        out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        start = time.perf_counter()
        firsts = range(0, len(pictures), BATCH)
        for first in tqdm(firsts, f"see {pictures.place.name}", disable=None):
            part = range(first, min(first + BATCH, len(pictures)))
            squares = torch.stack([prepared(pictures.read(n), pictures.names[n], config)
                                   for n in part])  # fmt: skip
            seen = encoder(normalise(squares.to(device), config.normalisation))
            out[part.start : part.stop] = seen.float().cpu().numpy().astype(np.float16)
        out.flush()
    rate = len(pictures) / (time.perf_counter() - start)
    print(f"{shown(path)}: {len(pictures):,} pictures at {rate:.1f} a second")


@dataclass(frozen=True)
class VqaDataConfig:
    """What is trained on.

    Args:
        sources: the mixture: sets in data/tokens/<tokenizer> with their pictures in data/pictures
        pictures: where the packed pictures lie
        max_val_rows: validation takes the first rows of each source, at most this many
        augment: pictures are mirrored and cut at random in training, for encoders that learn
        cache_features: a frozen encoder sees each picture once; its features stay on the disk
        workers: threads that decode pictures
    """

    sources: tuple[SourceConfig, ...] = ()
    pictures: Path = Path("data/pictures")
    max_val_rows: int = 256
    augment: bool = False
    cache_features: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if min(self.max_val_rows, self.workers) < 1:
            raise ConfigError(
                f"data wants max_val_rows and workers of 1 or more, found {self.max_val_rows} and "
                f"{self.workers}"
            )
        if self.augment and self.cache_features:
            raise ConfigError("data.augment changes pictures, data.cache_features keeps them; "
                              "choose one")  # fmt: skip


class PictureRow(NamedTuple):
    tokens: np.ndarray  # (n,) int64, with the positions of a first picture
    targets: np.ndarray  # (n,) int64
    picture: Wanted


class PictureRows:
    """A source. Dialogues that are too long lose whole turns from their end; those whose picture
    is not there, or whose first answer does not fit, are dropped. All are counted."""

    def __init__(
        self,
        config: SourceConfig,
        number: int,
        split: str,
        tokenizer: Tokenizer,
        pictures: Pictures,
        max_seq_len: int,
        n_positions: int,
        augment: bool = False,
    ) -> None:
        self.name, self.number, self.pictures = config.name, number, pictures
        self._tokenizer, self._max_seq_len = tokenizer, max_seq_len
        self._n_positions, self._augment = n_positions, augment
        self.files = token_files(config.name, split, tokenizer)
        self.dropped = {"picture_missing": 0, "answer_does_not_fit": 0, "turns_cut": 0}
        self._rows: list[tuple[int, int, int, int]] = []  # file, row, pieces that fit, picture
        for file, opened in enumerate(self.files):
            for row in range(opened.n_docs):
                self._count(file, row)
        if not self._rows:
            raise DataError(f"{config.name}: no row of {split} can be used {self.dropped}")

    def _count(self, file: int, row: int) -> None:
        pieces = self.files[file].pieces(row)
        picture = self.pictures.number.get(self._tokenizer.decode(pieces[0][1].tolist()))
        if picture is None:
            self.dropped["picture_missing"] += 1
            return
        for n_pieces in range(len(pieces), 2, -2):
            # Labels and separators add at most some ids a piece; only rows near the end are laid.
            n_ids = sum(len(ids) for _, ids in pieces[1:n_pieces])
            room = self._max_seq_len - self._n_positions
            if n_ids + 16 * n_pieces <= room or len(self._laid(pieces[:n_pieces])[0]) - 1 <= room:
                self.dropped["turns_cut"] += n_pieces < len(pieces)
                self._rows.append((file, row, n_pieces, picture))
                return
        self.dropped["answer_does_not_fit"] += 1

    def _laid(self, pieces: list) -> tuple[list[int], list[int]]:
        return self._tokenizer.render_chat(
            [{"role": role, "content": [ids.tolist()]} for role, ids in pieces[1:]]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def messages(self, number: int) -> tuple[int, list[dict]]:
        """The picture's number and the dialogue as texts."""
        file, row, n_pieces, picture = self._rows[number]
        pieces = self.files[file].pieces(row)[1:n_pieces]
        return picture, [
            {"role": role, "content": self._tokenizer.decode(ids.tolist())} for role, ids in pieces
        ]

    def row(self, number: int, rng: np.random.Generator) -> PictureRow:
        file, row, n_pieces, picture = self._rows[number]
        ids, mask = self._laid(self.files[file].pieces(row)[:n_pieces])
        n = self._n_positions
        tokens = np.array(with_picture(ids, 0, n), dtype=np.int64)
        is_target = np.array([mask[0], *[0] * n, *mask[1:]])
        targets = np.where(is_target[1:] == 1, tokens[1:], IGNORED)
        chance = int(rng.integers(1, 2**31)) if self._augment else 0
        return PictureRow(tokens[:-1], targets, Wanted(self.number, picture, chance))


def token_files(name: str, split: str, tokenizer: Tokenizer) -> list[TokenFile]:
    """The token files of a part of a set.

    raises: DataError with the commands that make them, where there are none
    """
    where = from_repo(Path("data/tokens") / tokenizer.name / name)
    where = from_repo(name) if "/" in name else where
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


def as_batch(
    rows: list[PictureRow], n_positions: int, pad_id: int, loader: Loader, key: str
) -> dict[str, Tensor]:
    """One batch: a picture that several rows are about comes once."""
    wanted = list(dict.fromkeys(row.picture for row in rows))
    number = {picture: n for n, picture in enumerate(wanted)}
    moved = [np.where(r.tokens < 0, r.tokens - number[r.picture] * n_positions, r.tokens)
             for r in rows]  # fmt: skip
    batch = collate([[(t, r.targets)] for t, r in zip(moved, rows, strict=True)], pad_id)
    batch["picture_of"] = torch.tensor([number[row.picture] for row in rows])
    batch[key] = loader.take(wanted)
    return batch


class VqaTrainData(TrainData):
    """The training rows of a mixture, step by step, with their pictures."""

    def __init__(
        self, mixture: Mixture, batch_size: int, room: tuple[int, int, int], loader: Loader,
        key: str,
    ) -> None:  # fmt: skip
        """room: longest sequence, id of filler, positions of a picture"""
        super().__init__(mixture, batch_size, room[0], room[1])
        self._n_positions, self._loader, self._key = room[2], loader, key

    def batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step, as many as every rank gets."""
        rows = self._own(step, rank, world_size)
        later = self._own(step + 1, rank, world_size)
        self._loader.ask([row.picture for row in rows + later])
        parts = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
        found = [as_batch(p, self._n_positions, self.pad_id, self._loader, self._key)
                 for p in parts]  # fmt: skip
        kept = {row.picture for row in later}
        self._loader.forget([row.picture for row in rows if row.picture not in kept])
        return found

    def _own(self, step: int, rank: int, world_size: int) -> list[PictureRow]:
        return own_rows(self.rows(step), rank, world_size)


def own_rows(rows: list[PictureRow], rank: int, world_size: int) -> list[PictureRow]:
    """This rank's rows, as many as every rank gets: one that would run out repeats a row without
    its targets. With shares of a model, all ranks must call it equally often."""
    mine = rows[rank::world_size]
    missing = -(-len(rows) // world_size) - len(mine)
    blank = rows[0]._replace(targets=np.full_like(rows[0].targets, IGNORED))
    return mine + [blank] * missing


class VqaValData(ValData):
    """The first validation rows of each source."""

    def __init__(
        self, sources: list[PictureRows], max_rows: int, room: tuple[int, int, int],
        loader: Loader, key: str,
    ) -> None:  # fmt: skip
        self._rows = {
            s.name: [s.row(i, np.random.default_rng(0)) for i in range(min(max_rows, len(s)))]
            for s in sources
        }
        self.pad_id, self._n_positions, self._loader, self._key = room[1], room[2], loader, key

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    def batches(
        self, name: str, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's part of a source's validation rows."""
        rows = own_rows(self._rows[name], rank, world_size)
        found = []
        for start in range(0, len(rows), micro_batch_size):
            part = rows[start : start + micro_batch_size]
            found.append(as_batch(part, self._n_positions, self.pad_id, self._loader, self._key))
            self._loader.forget([row.picture for row in part])
        return found


def open_pictures(config: VqaDataConfig) -> list[Pictures]:
    """The packed pictures of each source; errors as Pictures."""
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one set of rows about pictures")
    return [Pictures(from_repo(config.pictures) / Path(s.name).name) for s in config.sources]


def open_vqa_data(
    config: VqaDataConfig,
    tokenizer: Tokenizer,
    room: tuple[int, int, int],
    order: Order,
    pictures: list[Pictures],
    encoder: EncoderConfig,
    features: list[np.ndarray] | None = None,
) -> Data:
    """Training and validation data of a run.

    room: longest sequence, id of filler, positions of a picture
    features: of each source's pictures, where they were computed before
    raises: DataError or ConfigError where a source cannot be used
    """
    tokenizer.require_dialogue()
    train, val = (
        [
            PictureRows(s, n, split, tokenizer, pictures[n], room[0], room[2],
                        augment=config.augment and split == "train")
            for n, s in enumerate(config.sources)
        ]
        for split in ("train", "val")
    )  # fmt: skip

    def read(one: Wanted) -> Tensor:
        if features is not None:
            return torch.from_numpy(np.array(features[one.source][one.number]))
        held = pictures[one.source]
        return prepared(held.read(one.number), held.names[one.number], encoder, one.chance)

    loader, key = Loader(read, config.workers), "pixels" if features is None else "features"
    mixture = Mixture(train, [source.weight for source in config.sources], order.seed)
    return Data(
        VqaTrainData(mixture, order.batch_size, room, loader, key),
        VqaValData(val, config.max_val_rows, room, loader, key),
    )
