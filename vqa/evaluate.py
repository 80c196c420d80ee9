"""Score a model on questions about images, and see whether it looks at them.

    python -m vqa.evaluate out/vqa-splice --dataset cifar10_zh --split test
    python -m vqa.evaluate out/vqa-splice --dataset cifar10_zh --sheet assert/vqa.png

Each question is asked alone, or after the true turns before it, with its image, with another
row's image (shuffled), and with grey (blank): a model that ignores images shows no difference.
Questions with few different answers are closed: their accuracy stands beside that of the most
frequent answer to the same question. The others get ROUGE. Writes vqa-<dataset>-<split>.json
beside the checkpoints; with --sheet also photos with questions and answers, wrong ones in red.
"""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from babyllama.analysis.watch import cjk_font, writable
from babyllama.config import atomic_write, from_repo, parse, run, shown
from babyllama.device import pick_device
from babyllama.errors import ConfigError
from babyllama.scoring.rouge import bootstrap_interval, rouge_clipped
from babyllama.scoring.tables import table
from babyllama.scoring.test_sets import write_json
from vqa import images
from vqa.chat import greedy
from vqa.data import ImageRows, computed
from vqa.images import normalise
from vqa.model import Loaded, VqaModel, load
from vqa.pack import PackedImages

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MODES = ("true", "shuffled", "blank")
GREY, BLANK = 128, -1  # the colour of an image without content, and its number
MAX_ANSWERS = 20  # a question with at most so many different answers is closed
N_PHOTOS = 9  # on the sheet
# Of the sheet, in inches: a photo with its share of the gaps, a line of text. So many characters
# fill a line.
SIDE, LINE, LONGEST = 3.6, 0.24, 27


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Args:
        checkpoint: a run or a checkpoint of python -m vqa.train
        dataset: a set that was pre-tokenized and packed
        split: which part of it
        images: where the packed images lie
        sheet: an image to draw, of photos with their questions and answers
        device: where to compute; auto: the fastest there is
    """

    checkpoint: Path | None = None
    dataset: str = ""
    split: Literal["train", "val", "test"] = "test"
    images: Path = Path("data/pictures")
    sheet: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.checkpoint is None or not self.dataset:
            raise ConfigError("wanted python -m vqa.evaluate CHECKPOINT --dataset NAME")


class Asked(NamedTuple):
    """A question about an image, after the true turns before it."""

    image: int
    messages: list[dict]
    answer: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


def questions(loaded: Loaded, packed: PackedImages, dataset: str, split: str) -> list[Asked]:
    """Every question of a part of a set; errors as ImageRows."""
    model = loaded.model
    rows = ImageRows(dataset, 0, split, loaded.tokenizer, packed,
                       model.config.max_seq_len, model.n_positions)  # fmt: skip
    found = []
    for number in range(len(rows)):
        image, messages = rows.messages(number)
        found += [
            Asked(image, messages[:i], messages[i]["content"])
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    return found


@torch.inference_mode()
def features_for(
    model: VqaModel, packed: PackedImages, numbers: list[int]
) -> dict[int, np.ndarray]:
    """What the encoder sees in these images, (places, C) each, and as BLANK in a grey one."""
    config, device = model.encoder.config, model.output.weight.device
    shape = (1, config.n_squares, 3, config.size, config.size)
    grey = torch.full(shape, GREY, dtype=torch.uint8, device=device)
    blank = model.encoder(normalise(grey, config.normalisation)).float().cpu().numpy()
    parts = computed(model.encoder, packed, numbers, device)
    return dict(zip(numbers, itertools.chain.from_iterable(parts), strict=True)) | {BLANK: blank[0]}


def shuffled(asked: list[Asked], seed: int = 0) -> list[int]:
    """For each row the image of another row, every image as often as before."""
    order = np.random.default_rng(seed).permutation(len(asked))
    chosen = [0] * len(asked)
    # The row after it in a random circle; as rows of one image may meet there, the next one on.
    for place, row in enumerate(order):
        for step in range(1, len(asked)):
            other = asked[order[(place + step) % len(asked)]].image
            if other != asked[row].image:
                break
        chosen[row] = other
    return chosen


@torch.inference_mode()
def answers(
    loaded: Loaded, asked: list[Asked], chosen: list[int], features: dict[int, np.ndarray]
) -> list[str]:
    """The answer to each question, with the features that `chosen` names for it."""
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    prompts = [tokenizer.render_prompt(one.messages) for one in asked]
    order = sorted(range(len(asked)), key=lambda n: len(prompts[n]))  # little padding
    texts = [""] * len(asked)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        seen = torch.from_numpy(np.stack([features[chosen[n]] for n in part]))
        seen = model.see(features=seen.to(model.output.weight.device))
        replies = greedy(model, [prompts[n] for n in part], seen, tokenizer.eos_id)
        for n, ids in zip(part, replies, strict=True):
            texts[n] = tokenizer.decode(ids)
    return texts


def is_right(said: str, answer: str) -> bool:
    """True if two answers are the same but for space and a full stop."""
    return said.strip(" 。.\n") == answer.strip(" 。.\n")


def score(asked: list[Asked], said: dict[str, list[str]]) -> dict:
    """Figures per question and in all: accuracy of closed questions, ROUGE of the others."""
    goals = [one.answer for one in asked]
    right = {
        mode: np.array(list(map(is_right, texts, goals)), float) for mode, texts in said.items()
    }
    by_question = defaultdict(list)
    for number, one in enumerate(asked):
        by_question[one.question].append(number)
    closed, closed_rows, open_rows, n_majority = {}, [], [], 0
    for question, rows in by_question.items():
        counts = Counter(goals[n] for n in rows)
        if len(counts) <= MAX_ANSWERS and len(rows) >= 2 * len(counts):
            most = max(counts.values())
            closed[question] = {"rows": len(rows), "answers": len(counts),
                                "majority": most / len(rows), **_shares(right, rows)}  # fmt: skip
            closed_rows, n_majority = closed_rows + rows, n_majority + most
        else:
            open_rows += rows
    majority = n_majority / max(1, len(closed_rows))
    found = {
        "closed": {"majority": majority, **_shares(right, closed_rows)},
        "questions": closed,
        "rows": {"closed": len(closed_rows), "open": len(open_rows)},
    }
    if open_rows:
        wanted = [goals[n] for n in open_rows]
        found["open"] = {
            mode: {
                name: round(float(f.mean()), 4)
                for name, f in rouge_clipped([texts[n] for n in open_rows], wanted).f.items()
            }
            for mode, texts in said.items()
        }
    return found


def _shares(right: dict[str, np.ndarray], rows: list[int]) -> dict[str, float]:
    """The share of right answers by mode, with the 95 % interval of "true" where there are any."""
    if not rows:
        return dict.fromkeys(right, 0.0)
    low, high = bootstrap_interval(right["true"][rows])
    return {mode: float(flags[rows].mean()) for mode, flags in right.items()} | {
        "low": low, "high": high,
    }  # fmt: skip


def report(found: dict, limit: int = 12) -> str:
    """Figures as the user sees them."""
    modes = ("majority", *MODES)
    lines = [["question", "rows", *modes, "95 % of true"]]
    largest = sorted(found["questions"].items(), key=lambda item: -item[1]["rows"])
    rows = [*largest[:limit], ("all closed", found["closed"] | {"rows": found["rows"]["closed"]})]
    for question, figures in rows:
        interval = f"{figures['low']:.1%} - {figures['high']:.1%}" if "low" in figures else "-"
        cells = [f"{figures[mode]:.1%}" for mode in modes]
        lines.append([question, figures["rows"], *cells, interval])
    text = [table(lines)]
    text += [f"open, {mode}: {scores}" for mode, scores in found.get("open", {}).items()]
    return "\n".join(text)


def draw(photos: list, font: str | None) -> "Figure":
    """Each photo above its questions; a photo is (pixels, [(question, said, true)])."""
    from matplotlib.figure import Figure

    n_columns = int(np.ceil(np.sqrt(len(photos))))
    n_rows = -(-len(photos) // n_columns)
    high = SIDE + LINE * (1 + max(len(lines) for _, lines in photos))
    figure = Figure(figsize=(n_columns * SIDE, n_rows * high))
    axes = figure.subplots(
        n_rows, n_columns, squeeze=False, gridspec_kw={"hspace": high / SIDE - 1}
    )
    family = {"fontfamily": font} if font else {}
    for ax in axes.flat:
        ax.axis("off")
    for ax, (pixels, lines) in zip(axes.flat, photos, strict=False):
        ax.imshow(pixels)
        ax.set_anchor("NW")
        for n, (question, said, true) in enumerate(lines):
            right = is_right(said, true)
            text = f"{question} {said}" + ("" if right else f"（{true}）")
            text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
            ax.annotate(
                writable(text, font), (0, 0), (0, -72 * LINE * (n + 0.3)),
                xycoords="axes fraction", textcoords="offset points", va="top", fontsize=9,
                color="black" if right else "crimson", **family,
            )  # fmt: skip
    return figure


def write_sheet(path: Path, packed: PackedImages, asked: list[Asked], said: list[str]) -> None:
    """Draw some photos at random, each with at most four of its questions."""
    by_photo: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
    for one, text in zip(asked, said, strict=True):
        by_photo[one.image].append((one.question, text, one.answer))
    numbers = np.random.default_rng(0).permutation(list(by_photo))[:N_PHOTOS]
    photos = [(np.asarray(images.decode(packed.read(n))), by_photo[n][:4]) for n in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        draw(photos, cjk_font()).savefig(
            temporary, format="png", dpi=80, bbox_inches="tight", pad_inches=0.1
        )
    print(f"written: {shown(path)}")


def main(cfg: EvaluateConfig) -> None:
    """Score, print, and write the figures."""
    assert cfg.checkpoint
    loaded = load(from_repo(cfg.checkpoint), pick_device(cfg.device))
    packed = PackedImages(from_repo(cfg.images) / Path(cfg.dataset).name)
    asked = questions(loaded, packed, cfg.dataset, cfg.split)
    numbers = sorted({one.image for one in asked})
    features = features_for(loaded.model, packed, numbers)
    chosen = {
        "true": [one.image for one in asked],
        "shuffled": shuffled(asked),
        "blank": [BLANK] * len(asked),
    }
    said = {mode: answers(loaded, asked, chosen[mode], features) for mode in MODES}
    found = score(asked, said)
    print(report(found))
    if cfg.sheet:
        write_sheet(from_repo(cfg.sheet), packed, asked, said["true"])
    found |= {"checkpoint": shown(loaded.path), "step": loaded.step}
    write_json(loaded.path.parent / f"vqa-{Path(cfg.dataset).name}-{cfg.split}.json", found)


if __name__ == "__main__":
    run(main, parse(EvaluateConfig, __doc__, positional=("checkpoint",)))
