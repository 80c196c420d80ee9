"""Packed images: the tar files of a set, written by this command, read in order or by name.

    python -m vqa.pack cifar10_zh --images ~/cifar10_zh
    python -m vqa.pack chinese_llava --images ~/images --max_side 336

    data/pictures/<set>/pictures-00000.tar      the images' own bytes, in the order of the rows
                        pictures-00000.index    bytes of the .tar, then "place size name" a line
                        counts.json             what was taken and what was left, with reasons

A tar file is what every tool opens and what a network disk likes: one long file, members of which
are whole encoded images behind 512 bytes of head. The index saves reading the heads; where it is
missing or old they are read. The command decodes every image that the rows of data/clean/<set>
name once, to see that it can be; images that are missing or bad are counted, with examples, and
left out; so are their rows in training.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babyllama.config import atomic_dir, from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
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
        """The bytes of an image."""
        shard, start, size = self._members[number]
        return read_piece(self._shards[shard], start, size)


def read_piece(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file; safe from several threads."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def members(tar: Path) -> list[tuple[str, int, int]]:
    """(name, place, size) of each image of a shard.

    raises: DataError if the file is cut off or no tar file
    """
    size, index = tar.stat().st_size, tar.with_suffix(".index")
    if index.is_file():
        head, *lines = index.read_text("utf-8", "replace").split("\n")
        if head == f"{size} {len(lines) - 1}" and not lines.pop():  # whole, and of this file
            parts = [line.split(" ", 2) for line in lines]
            return [(name, int(start), int(n)) for start, n, name in parts]
    try:
        with tarfile.open(tar) as archive:
            found = [(m.name, m.offset_data, m.size) for m in archive.getmembers() if m.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown(tar)}: wanted a tar file, found {error}; pack it again") from None
    if found and found[-1][1] + found[-1][2] > size:
        raise DataError(f"{shown(tar)}: cut off inside {found[-1][0]!r}; pack or copy it again")
    return found


class Finder:
    """Finds the images that rows name: in a directory, in its tar files, in parquet rows.

    A name may lack or have the prefix that COCO's 2014 edition puts before numbers, and may have
    folders where the directory is flat. "file.parquet#7" is the image of a parquet file's row 7,
    "file.parquet#7.1" the second one of a row that has several.
    """

    def __init__(self, root: Path) -> None:
        self.root = from_repo(root).resolve()
        if not self.root.is_dir():
            raise DataError(f"{root}: wanted the directory of the images, found none there")
        self._in_tars = {
            name: (tar, start, size)
            for tar in sorted(self.root.glob("*.tar"))
            for name, start, size in members(tar)
        }
        self._table: tuple[str, list] = ("", [])

    def find(self, name: str) -> bytes | Path | None:
        """The image's bytes or its file; None if there is none.

        raises: DataError if the name leads out of the directory
        """
        file, _, row = name.partition("#")
        if row and file.endswith(".parquet"):
            return self._from_parquet(file, row)
        flat = name.rsplit("/", 1)[-1]
        bare = flat.removeprefix(COCO)
        folder = name[: -len(flat)]
        for tried in (name, folder + COCO + bare, folder + bare, flat, COCO + bare, bare):
            if tried in self._in_tars:
                return read_piece(*self._in_tars[tried])
            path = (self.root / tried).resolve()
            if not path.is_relative_to(self.root):
                raise DataError(f"{name!r} leads out of {shown(self.root)}")
            if path.is_file():
                return path
        return None

    def _from_parquet(self, file: str, row: str) -> bytes | None:
        if self._table[0] != file:
            path = (self.root / file).resolve()
            if not path.is_relative_to(self.root) or not path.is_file():
                return None
            self._table = (file, read_column(path, "image_bytes"))
        number, _, part = row.partition(".")
        held = self._table[1][int(number)] if int(number) < len(self._table[1]) else None
        if isinstance(held, list):
            held = held[int(part or 0)] if int(part or 0) < len(held) else None
        return held


def read_column(path: Path, name: str) -> list:
    """A column of a parquet file as Python objects.

    raises: DataError if the file or the column is missing
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path, columns=[name]).column(name).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{shown(path)}: wanted a column {name}, found {error}") from None


@dataclass(frozen=True)
class PackConfig:
    """Images to pack.

    Args:
        dataset: name of a set in data/clean, or a directory of rows
        images: directory of the images: files, tar files or parquet files
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
        if self.workers < 1 or self.max_side < 0:
            raise ConfigError(
                f"wanted workers of 1 or more and max_side of 0 or more, found {self.workers} and "
                f"{self.max_side}"
            )


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


def checked(source: bytes | Path | None, name: str, max_side: int) -> bytes | str:
    """The bytes of an image that can be used, or why it cannot."""
    if source is None:
        return "missing"
    try:
        image = images.decode(source, name)
    except DataError as error:
        return str(error)
    if image.size == (8, 8) and image.getextrema() == ((0, 0),) * 3:
        return "black 8 x 8, which minimind-v puts where there is no image"
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92)
        return out.getvalue()
    return source if isinstance(source, bytes) else source.read_bytes()


# What a fault says, and its short name, by which it is counted.
REASONS = {
    ": no such image": "missing",
    "that are none, they begin": "not_an_image",
    "found it cut off or damaged": "cut_off_or_damaged",
    " pixels, found ": "too_many_pixels",
    " MB, found ": "too_many_bytes",
    " leads out of ": "outside",
    "black 8 x 8": "black_8x8",
}


def reason_of(fault: str) -> str:
    """A fault's short name."""
    if fault == "missing":
        return fault
    return next((name for said, name in REASONS.items() if said in fault), "other")


def each_image(names: list[str], cfg: PackConfig) -> Iterator[tuple[str, bytes | str]]:
    """Every name with its bytes or its fault, in order, decoded by the workers."""
    assert cfg.images
    finder = Finder(cfg.images)

    def found(name: str) -> bytes | Path | str | None:
        try:
            return finder.find(name)
        except DataError as error:
            return str(error)

    def check(source: bytes | Path | str | None, name: str) -> bytes | str:
        return source if isinstance(source, str) else checked(source, name, cfg.max_side)

    with ThreadPoolExecutor(cfg.workers) as pool:
        for start in range(0, len(names), AHEAD):
            part = names[start : start + AHEAD]
            yield from zip(part, pool.map(check, map(found, part), part), strict=True)


def pack(cfg: PackConfig, shard_bytes: int = SHARD_BYTES) -> dict:
    """Write the shards; returns what counts.json says."""
    rows = from_repo(cfg.dataset if "/" in cfg.dataset else Path("data/clean") / cfg.dataset)
    names = image_names(rows)
    target = from_repo(cfg.out) / rows.name
    with atomic_dir(target) as place:
        counts = _write_shards(names, cfg, place, shard_bytes)
        if not counts["images"]:
            first = next(iter(counts["examples"].values()))[0]
            raise DataError(
                f"{cfg.images}: wanted the images of {rows.name}, found none of {len(names)} "
                f"that can be used: {counts['left_out']}; the first: {first}; say with --images "
                f"where they lie"
            )
        for tar in place.glob("*.tar"):
            lines = [f"{start} {size} {name}" for name, start, size in members(tar)]
            text = "\n".join([f"{tar.stat().st_size} {len(lines)}", *lines]) + "\n"
            tar.with_suffix(".index").write_text(text, "utf-8")
        text = json.dumps(counts, ensure_ascii=False, indent=1) + "\n"
        (place / "counts.json").write_text(text, "utf-8")
    return counts


def _write_shards(names: list[str], cfg: PackConfig, place: Path, shard_bytes: int) -> dict:
    faults: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    n_taken, n_shards, archive = 0, 0, None
    for name, found in tqdm(each_image(names, cfg), "pack", len(names), unit=" images",
                            disable=None):  # fmt: skip
        if isinstance(found, str):
            reason = reason_of(found)
            faults[reason] += 1
            if len(examples.setdefault(reason, [])) < N_EXAMPLES:
                examples[reason].append(f"{name}: {found}")
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
    return {"images": n_taken, "left_out": dict(faults), "examples": examples}


def main(cfg: PackConfig) -> None:
    """Pack, and say what was taken."""
    counts = pack(cfg)
    left = ", ".join(f"{reason} {n:,}" for reason, n in counts["left_out"].items()) or "none"
    print(f"{cfg.dataset}: {counts['images']:,} images packed; left out: {left}")


if __name__ == "__main__":
    run(main, parse(PackConfig, __doc__, positional=("dataset",)))
