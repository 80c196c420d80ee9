"""Pack the pictures that the rows of a set name, each decoded once to see that it can be.

    python -m vqa.pack cifar10_zh --images ~/cifar10_zh
    python -m vqa.pack chinese_llava --images ~/images --max_side 336

Reads data/clean/<set>/*.jsonl and writes data/pictures/<set>/ (pictures.py). Pictures that are
missing or bad are counted, with examples, and left out; so are their rows in training.
"""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows
from vqa import images
from vqa.pictures import SHARD_BYTES, Finder, write_index

N_EXAMPLES = 5
AHEAD = 64  # pictures that are decoded while others are written


@dataclass(frozen=True)
class PackConfig:
    """What is packed.

    Args:
        dataset: name of a set in data/clean, or a directory of rows
        images: directory of the pictures: files, tar files or parquet files
        out: where the packed sets lie
        max_side: larger pictures are made smaller, to this; 0: all stay as they are
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


def picture_names(rows: Path) -> list[str]:
    """The pictures that rows name, each once, in order.

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
                raise DataError(f"{shown(file)}: wanted rows with a picture, found {row['id']!r}")
            names[row["image"]] = None
    return list(names)


def checked(source: bytes | Path | None, name: str, max_side: int) -> bytes | str:
    """The bytes of a picture that can be used, or why it cannot."""
    if source is None:
        return "missing"
    try:
        image = images.decode(source, name)
    except DataError as error:
        return str(error)
    if image.size == (8, 8) and image.getextrema() == ((0, 0),) * 3:
        return "black 8 x 8, which minimind-v puts where there is no picture"
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92)
        return out.getvalue()
    return source if isinstance(source, bytes) else source.read_bytes()


# What a fault says, and its short name, by which it is counted.
REASONS = {
    ": no such picture": "missing",
    "that are none, they begin": "not_a_picture",
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


def each_picture(names: list[str], cfg: PackConfig) -> Iterator[tuple[str, bytes | str]]:
    """Every name with its bytes or its fault, in order, decoded by the workers."""
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
    names = picture_names(rows)
    target = from_repo(cfg.out) / rows.name
    temporary = target.with_name(f"tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    faults: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    n_taken, n_shards, archive = 0, 0, None
    for name, found in tqdm(each_picture(names, cfg), "pack", len(names), unit=" pictures",
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
            path = temporary / f"pictures-{n_shards:05d}.tar"
            archive, n_shards = tarfile.open(path, "w"), n_shards + 1  # noqa: SIM115
        head = tarfile.TarInfo(name)
        head.size = len(found)
        archive.addfile(head, io.BytesIO(found))
        n_taken += 1
    if archive is None:
        shutil.rmtree(temporary)
        raise DataError(
            f"{cfg.images}: wanted the pictures of {rows.name}, found none of {len(names)} that "
            f"can be used: {dict(faults)}; the first: {next(iter(examples.values()))[0]}; say with "
            f"--images where they lie"
        )
    archive.close()
    for path in temporary.glob("*.tar"):
        write_index(path)
    counts = {"pictures": n_taken, "left_out": dict(faults), "examples": examples}
    (temporary / "counts.json").write_text(
        json.dumps(counts, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return counts


def main(cfg: PackConfig) -> None:
    """Pack, and say what was taken."""
    counts = pack(cfg)
    left = ", ".join(f"{reason} {n:,}" for reason, n in counts["left_out"].items()) or "none"
    print(f"{cfg.dataset}: {counts['pictures']:,} pictures packed; left out: {left}")


if __name__ == "__main__":
    run(main, parse(PackConfig, __doc__, positional=("dataset",)))
