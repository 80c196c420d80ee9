"""Packed images: the tar files of a set, written by this command, read in order or by name.

    python -m vqa.pack cifar10_zh --images ~/cifar10_zh
    python -m vqa.pack chinese_llava --images ~/images --max_side 336

    data/pictures/<set>/pictures-00000.tar      the images' own bytes, in the order of the rows
                        counts.json             what was taken and what was left, with reasons

A tar file is what every tool opens and what a network disk likes: one long file, members of which
are whole encoded images behind 512 bytes of head. The command decodes every image that the rows of
data/clean/<set> name once, to see that it can be; images that are missing or bad are counted, with
examples, and left out; so are their rows in training.
"""

import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from babyllama.config import atomic_dir, from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError, require
from babyllama.rows import read_rows
from vqa import images

SHARD_BYTES = 1 << 30
COCO = "COCO_train2014_"
N_EXAMPLES = 5
AHEAD = 64  # images that are decoded while others are written


class PackedImages:
    """The images of a packed set.

    names: in the order of the shards; an image's number is its place here
    """

    def __init__(self, place: Path) -> None:
        """raises: DataError if there are none, or a shard is cut off"""
        self.place = from_repo(place)
        self._shards = sorted(self.place.glob("pictures-*.tar"))
        if not self._shards:
            raise DataError(
                f"{shown(self.place)}: wanted pictures-*.tar, found none; pack them: "
                f"python -m vqa.pack {self.place.name} --images DIRECTORY"
            )
        self._members: list[tuple[int, int, int]] = []  # shard, place, size
        self.number: dict[str, int] = {}
        for shard, path in enumerate(self._shards):
            for name, start, size in members(path):
                self.number[name] = len(self._members)
                self._members.append((shard, start, size))
        self.names = list(self.number)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, number: int) -> bytes:
        """The bytes of an image; safe from several threads."""
        shard, start, size = self._members[number]
        with open(self._shards[shard], "rb") as file:
            file.seek(start)
            return file.read(size)


def members(tar: Path) -> list[tuple[str, int, int]]:
    """(name, place, size) of each image of a shard.

    raises: DataError if the file is cut off or no tar file
    """
    try:
        with tarfile.open(tar) as archive:
            found = [(m.name, m.offset_data, m.size) for m in archive.getmembers() if m.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown(tar)}: wanted a tar file, found {error}; pack it again") from None
    if found and found[-1][1] + found[-1][2] > tar.stat().st_size:
        raise DataError(f"{shown(tar)}: cut off inside {found[-1][0]!r}; pack or copy it again")
    return found


class Finder:
    """Finds the images that rows name: in a directory, or in parquet rows.

    A name may lack or have the prefix that COCO's 2014 edition puts before numbers, and may have
    folders where the directory is flat. "file.parquet#7" is the image of a parquet file's row 7,
    "file.parquet#7.1" the second one of a row that has several.
    """

    def __init__(self, root: Path) -> None:
        self.root = from_repo(root).resolve()
        if not self.root.is_dir():
            raise DataError(f"{root}: wanted the directory of the images, found none there")

    def find(self, name: str) -> bytes | Path:
        """The image's bytes or its file.

        raises: DataError if there is none, or the name leads out of the directory
        """
        file, _, row = name.partition("#")
        is_row = bool(row) and file.endswith(".parquet")
        flat = name.rsplit("/", 1)[-1]
        bare, folder = flat.removeprefix(COCO), name[: -len(flat)]
        others = (name, folder + COCO + bare, folder + bare, flat, COCO + bare, bare)
        for tried in (file,) if is_row else others:
            path = (self.root / tried).resolve()
            if not path.is_relative_to(self.root):
                raise DataError(f"{name}: leads out; wanted an image in {shown(self.root)}")
            if path.is_file() and is_row:
                number, _, part = row.partition(".")
                held = dict(enumerate(image_column(path))).get(int(number))
                held = held if isinstance(held, list) else [held]
                if int(part or 0) < len(held) and held[int(part or 0)] is not None:
                    return held[int(part or 0)]
            elif path.is_file():
                return path
        raise DataError(f"{name}: no such image; wanted it in {shown(self.root)}")


@lru_cache(maxsize=1)
def image_column(path: Path) -> list:
    """The images of a parquet file's rows: bytes, or lists of them.

    raises: DataError if the file or the column is missing
    """
    import pyarrow
    import pyarrow.parquet as parquet

    name = "image_bytes"
    try:
        return parquet.read_table(path, columns=[name]).column(name).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{shown(path)}: wanted a column {name}, found {error}") from None


@dataclass(frozen=True)
class PackConfig:
    """Images to pack.

    Args:
        dataset: name of a set in data/clean, or a directory of rows
        images: directory of the images: files or parquet files
        out: where the packed sets lie
        max_side: larger images are made smaller, to this; 0: all stay as they are
        workers: threads that decode
    """

    dataset: str = ""
    images: Path | None = None
    out: Path = Path("data/pictures")
    max_side: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.dataset or self.images is None:
            raise ConfigError(
                "wanted a set and --images DIRECTORY: python -m vqa.pack SET --images"
            )
        wanted = {
            "workers": ("1 or more", self.workers >= 1),
            "max_side": ("0 or more", self.max_side >= 0),
        }
        require("pack", self, wanted)


def image_names(rows: Path) -> list[str]:
    """The images that rows name, each once, in order.

    raises: DataError if there are no rows, or rows of another kind
    """
    files = sorted(rows.glob("*-*.jsonl"))
    if not files:
        raise DataError(
            f"{shown(rows)}: wanted rows (train-*.jsonl), found none; make them: "
            f"python -m data_process.run vqa --name {rows.name} --raw DIRECTORY"
        )
    names: dict[str, None] = {}
    for file in files:
        for row in read_rows(file):
            if "image" not in row:
                raise DataError(f"{shown(file)}: wanted rows with an image, found {row['id']!r}")
            names[row["image"]] = None
    return list(names)


def checked(source: bytes | Path, name: str, max_side: int) -> bytes:
    """The bytes of an image, made smaller where it is too large.

    raises: DataError if it cannot be used
    """
    image = images.decode(source, name)
    if image.size == (8, 8) and image.getextrema() == ((0, 0),) * 3:
        raise DataError(f"{name}: black 8 x 8; minimind-v puts that where there is no image")
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92)
        return out.getvalue()
    return source if isinstance(source, bytes) else source.read_bytes()


def each_image(names: list[str], cfg: PackConfig) -> Iterator[tuple[str, bytes | DataError]]:
    """Every name with its bytes or its fault, in order, decoded by the workers."""
    assert cfg.images
    finder = Finder(cfg.images)

    def usable(name: str) -> bytes | DataError:
        try:
            with lock:  # of a table that several want, one is read
                source = finder.find(name)
            return checked(source, name, cfg.max_side)
        except DataError as error:
            return error

    lock = Lock()
    with ThreadPoolExecutor(cfg.workers) as pool:
        for start in range(0, len(names), AHEAD):
            part = names[start : start + AHEAD]
            yield from zip(part, pool.map(usable, part), strict=True)


def pack(cfg: PackConfig, shard_bytes: int = SHARD_BYTES) -> dict:
    """Write the shards; returns what counts.json says."""
    rows = from_repo(cfg.dataset if "/" in cfg.dataset else Path("data/clean") / cfg.dataset)
    names = image_names(rows)
    with atomic_dir(from_repo(cfg.out) / rows.name) as place:
        counts = _write_shards(names, cfg, place, shard_bytes)
        if not counts["images"]:
            raise DataError(
                f"{cfg.images}: wanted the images of {rows.name}, found none of {len(names)} "
                f"that can be used: {counts['left_out']}; say with --images where they lie"
            )
        text = json.dumps(counts, ensure_ascii=False, indent=1) + "\n"
        (place / "counts.json").write_text(text, "utf-8")
    return counts


def _write_shards(names: list[str], cfg: PackConfig, place: Path, shard_bytes: int) -> dict:
    faults: dict[str, list[str]] = defaultdict(list)
    n_taken, n_shards, archive = 0, 0, None
    for name, found in tqdm(each_image(names, cfg), "pack", len(names), unit=" images",
                            disable=None):  # fmt: skip
        if isinstance(found, DataError):
            # What a fault says between the name and what was found counts as its reason.
            fault = str(found).removeprefix(f"{name}: ")
            faults[re.split(", found|;", fault)[0]].append(str(found))
            continue
        if archive is None or archive.offset > shard_bytes:
            if archive is not None:
                archive.close()
            path = place / f"pictures-{n_shards:05d}.tar"
            archive, n_shards = tarfile.open(path, "w"), n_shards + 1  # noqa: SIM115
        head = tarfile.TarInfo(name)
        head.size = len(found)
        archive.addfile(head, io.BytesIO(found))
        n_taken += 1
    if archive is not None:
        archive.close()
    left_out = {reason: len(said) for reason, said in faults.items()}
    examples = {reason: said[:N_EXAMPLES] for reason, said in faults.items()}
    return {"images": n_taken, "left_out": left_out, "examples": examples}


def main(cfg: PackConfig) -> None:
    """Pack, and say what was taken."""
    counts = pack(cfg)
    left = "; ".join(f"{reason}: {n:,}" for reason, n in counts["left_out"].items()) or "none"
    print(f"{cfg.dataset}: {counts['images']:,} images packed; left out: {left}")


if __name__ == "__main__":
    run(main, parse(PackConfig, __doc__, positional=("dataset",)))
