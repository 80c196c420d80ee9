"""A picture of pictures: photos of a set with questions, the model's answers, and the true ones.

    python -m vqa.show out/vqa-splice --dataset cifar10_zh --split test --out assert/vqa.png

Rows are drawn at random, each photo once; one answer in red is wrong.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babyllama.config import atomic_write, from_repo, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.log import cjk_font, writable
from vqa import images
from vqa.evaluate import Asked, answers, features_for, is_right, questions
from vqa.model import load
from vqa.pictures import Pictures

# Inches: a cell's width and gap, a photo's side, a line of text. So many characters fill a line.
CELL, GAP, LINE, LONGEST = 3.3, 0.25, 0.24, 27


@dataclass(frozen=True)
class ShowConfig:
    """What is shown.

    Args:
        checkpoint: a run or a checkpoint of python -m vqa.train
        dataset: a set that was pre-tokenized and packed
        split: which part of it
        pictures: where the packed pictures lie
        out: the picture that is written
        n_photos: how many photos, best a square number
        seed: of the choice
    """

    checkpoint: Path | None = None
    dataset: str = ""
    split: str = "test"
    pictures: Path = Path("data/pictures")
    out: Path = Path("out/vqa.png")
    n_photos: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint is None or not self.dataset or self.n_photos < 1:
            raise ConfigError("wanted python -m vqa.show CHECKPOINT --dataset NAME --n_photos 9")


def choose(asked: list[Asked], n_photos: int, seed: int) -> list[list[Asked]]:
    """The questions about some photos, at most four each."""
    by_photo: dict[int, list[Asked]] = {}
    for one in asked:
        by_photo.setdefault(one.picture, []).append(one)
    order = np.random.default_rng(seed).permutation(len(by_photo))[:n_photos]
    photos = list(by_photo.values())
    return [photos[n][:4] for n in order]


def draw(photos: list, font: str | None) -> "object":
    """The figure: each photo above its questions; a photo is (pixels, [(question, said, true)])."""
    from matplotlib.figure import Figure

    n_columns = int(np.ceil(np.sqrt(len(photos))))
    n_rows = -(-len(photos) // n_columns)
    high = CELL + LINE * (max(len(lines) for _, lines in photos) + 1)
    width, height = n_columns * (CELL + GAP), n_rows * high
    figure = Figure(figsize=(width, height))
    family = {"fontfamily": font} if font else {}
    for place, (pixels, lines) in enumerate(photos):
        row, column = divmod(place, n_columns)
        left, top = column * (CELL + GAP), height - row * high
        ax = figure.add_axes((left / width, (top - CELL) / height, CELL / width, CELL / height))
        ax.imshow(pixels)
        ax.axis("off")
        for n, (question, said, true) in enumerate(lines):
            right = is_right(said, true)
            text = f"{question} {said}" + ("" if right else f"（{true}）")
            text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
            below = (top - CELL - LINE * (n + 0.3)) / height
            figure.text(left / width, below, writable(text, font), va="top", fontsize=9,
                        color="black" if right else "crimson", **family)  # fmt: skip
    return figure


def main(cfg: ShowConfig) -> None:
    """Ask, draw, write."""
    loaded = load(from_repo(cfg.checkpoint))
    pictures = Pictures(from_repo(cfg.pictures) / Path(cfg.dataset).name)
    chosen = choose(questions(loaded, pictures, cfg.dataset, cfg.split), cfg.n_photos, cfg.seed)
    numbers = [photo[0].picture for photo in chosen]
    features, _ = features_for(loaded.model, pictures, numbers)
    asked = [one for photo in chosen for one in photo]
    said = iter(answers(loaded, asked, [numbers.index(one.picture) for one in asked], features))
    photos = [
        (
            np.asarray(images.decode(pictures.read(photo[0].picture))),
            [(one.question, next(said), one.answer) for one in photo],
        )
        for photo in chosen
    ]
    out = from_repo(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as path:
        figure = draw(photos, cjk_font())
        figure.savefig(path, format="png", dpi=80, bbox_inches="tight", pad_inches=0.1)
    print(f"written: {shown(out)}")


if __name__ == "__main__":
    run(main, parse(ShowConfig, __doc__, positional=("checkpoint",)))
