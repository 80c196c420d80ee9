"""Bad files and places: each gets one clear line and exit code 2, and every file stays as it was.

`harm` changes one thing in a directory in which pretraining and fine-tuning would run.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from babyllama.data import open_data
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.token_file import TokenFileWriter
from babyllama.trainer import TrainConfig
from conftest import SMALL_PROMPTS, TEXTS, contents, write_run
from data_process.vocabulary import train_vocabulary
from tokenizer import Tokenizer


class Place(NamedTuple):
    root: Path
    tokenizer: Tokenizer  # a copy of its own, at root / "small.model"
    pretrain: tuple[str, ...]  # command lines, without the script's name
    sft: tuple[str, ...]

    def file(self, name: str) -> Path:
        return self.root / "tokens" / name


@pytest.fixture
def place(tmp_path: Path, token_root: Path, tokenizer: Tokenizer, checkpoint: Path) -> Place:
    shutil.copy(tokenizer.path, tmp_path / "small.model")
    copy = Tokenizer(tmp_path / "small.model")
    pretrain = ("--config", str(write_run(tmp_path / "pretrain.yaml", token_root, copy)))
    sft = ("--config", str(write_run(tmp_path / "sft.yaml", token_root)), "--base", str(checkpoint))
    return Place(tmp_path, copy, pretrain, sft)


def cut(name: str, n_bytes: int) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        data = place.file(name).read_bytes()
        place.file(name).write_bytes(data[:-n_bytes])

    return harm


def flip(name: str, position: int) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        data = bytearray(place.file(name).read_bytes())
        data[position] ^= 1
        place.file(name).write_bytes(data)

    return harm


def replace(name: str, data: bytes) -> Callable[[Place], None]:
    return lambda place: place.file(name).write_bytes(data) and None


def remove(*names: str) -> Callable[[Place], None]:
    return lambda place: [place.file(name).unlink() for name in names] and None


def rows_of(kind: str, split: str, *rows: object) -> Callable[[Place], None]:
    """The set has these rows and no others; each is text ids or (role, ids) pieces."""

    def harm(place: Place) -> None:
        stem = place.file(f"{kind}/{split}-00000")
        with TokenFileWriter(stem, kind, place.tokenizer) as file:
            for row in rows:
                file.add_text(row) if kind == "text" else file.add_row(row)

    return harm


def another_vocabulary(place: Place, size: int = 420) -> None:
    train_vocabulary([text[::-1] for text in TEXTS] * 5, place.root / "small.model", size)


def smaller_vocabulary(place: Place) -> None:
    another_vocabulary(place, 400)


def add(name: str, data: bytes) -> Callable[[Place], None]:
    return lambda place: (place.root / name).write_bytes(data) and None


LONG = [("user", [5] * 90), ("assistant", [6] * 90)]
UNANSWERED = [("system", [5] * 9), ("user", [5] * 9)]

PRETRAIN = {
    "no tokenizer": (lambda p: (p.root / "small.model").unlink(), "no such file"),
    "a foreign tokenizer": (add("small.model", b"gAAAA 0\nhQAA 1\n" * 9), "SentencePiece"),
    "an empty tokenizer": (add("small.model", b""), "small.model"),
    "another tokenizer": (another_vocabulary, "made with tokenizer"),
    "a smaller tokenizer": (smaller_vocabulary, "made with tokenizer"),
    "ids cut by a byte": (cut("text/train-00000.bin", 1), "damaged or cut"),
    "ids cut by an id": (cut("text/train-00000.bin", 2), "damaged or cut"),
    "an altered id": (flip("text/train-00000.bin", 100), "damaged or cut"),
    "empty ids": (replace("text/val-00000.bin", b""), "damaged or cut"),
    "no ids": (remove("text/train-00000.bin"), "no such file"),
    "no index": (remove("text/train-00000.idx"), "python -m data_process.run text"),
    "no validation": (remove("text/val-00000.idx", "text/val-00000.bin"), "val-*.idx); make them"),
    "a cut index": (cut("text/train-00000.idx", 7), "damaged or cut"),
    "an altered index": (flip("text/train-00000.idx", 60), "damaged or cut"),
    "an empty index": (replace("text/train-00000.idx", b""), "wanted a babyllama index"),
    "a foreign index": (replace("text/train-00000.idx", b"MMIDIDX\0" * 99), "wanted a babyllama"),
    "an empty set": (rows_of("text", "train"), "make the set again"),
    "an empty validation set": (rows_of("text", "val"), "no row of val"),
    "a set of one id": (rows_of("text", "train", [5]), "no row of train"),
}
SFT = {
    "an empty set": (rows_of("chat", "train"), "no row of train"),
    "only long dialogues": (rows_of("chat", "train", LONG, LONG), "longer model.max_seq_len"),
    "no answers": (rows_of("chat", "train", UNANSWERED), "no row of train"),
    "no answers to validate": (rows_of("chat", "val", UNANSWERED), "no row of val"),
    "only long summaries": (
        rows_of("summary", "train", [("text", [5] * 20), ("summary", [6] * 120)]),
        "no row of train",
    ),
    "files of two kinds": (
        lambda p: [
            shutil.copy(f, p.file("chat") / f.name.replace("00000", "00001"))
            for f in p.file("text").iterdir()
        ],
        "files of several kinds",
    ),
    "a base without a tokenizer": (
        lambda p: (p.root / "out/small/step-000007/tokenizer.model").unlink(),
        "lacks tokenizer.model",
    ),
    "a cut base": (
        lambda p: os.truncate(p.root / "out/small/step-000007/model.safetensors", 5000),
        "fails its checksum in model.safetensors",
    ),
    "no base": (lambda p: shutil.rmtree(p.root / "out"), "no such checkpoint"),
}


@pytest.mark.parametrize(
    "name, fault", [("pretrain.py", f) for f in PRETRAIN] + [("sft.py", f) for f in SFT]
)
def test_a_bad_file_is_one_line_and_changes_nothing(name, fault, place, script):
    (harm, words), argv = (
        (PRETRAIN[fault], place.pretrain) if name == "pretrain.py" else (SFT[fault], place.sft)
    )
    harm(place)
    before = contents(place.root)
    found = script(name, *argv)
    assert words in found.error
    assert len(found.err.splitlines()) == 1 and found.out == ""
    assert contents(place.root) == before


def test_without_harm_both_scripts_run_and_say_what_they_leave_out(place, script):
    short = ("--train.max_steps", "1")
    rows = [LONG, [("user", [5] * 9), ("assistant", [6] * 9)], UNANSWERED]
    rows_of("chat", "train", *rows)(place)
    assert script("pretrain.py", *place.pretrain, *short).code == 0
    found = script("sft.py", *place.sft, *short)
    assert found.code == 0
    assert "chat answer_does_not_fit 2" in found.err  # the long one, and the unanswered one


def test_another_tokenizer_is_refused_when_a_run_goes_on(place, script):
    """The same path, another file, and token files that were made again with it."""
    assert script("pretrain.py", *place.pretrain, "--train.max_steps", "5").code == 0
    another_vocabulary(place)
    other = Tokenizer(place.root / "small.model")
    for split in ("train", "val"):
        with TokenFileWriter(place.file(f"text/{split}-00000"), "text", other) as file:
            file.add_text(range(3, 400))
    before = contents(place.root)
    found = script("pretrain.py", *place.pretrain, "--train.max_steps", "5")
    assert "trained with another tokenizer" in found.error
    assert contents(place.root) == before
    base = ("--base", place.root / "pretrain", "--name", place.root / "more")
    found = script("pretrain.py", *place.pretrain, *base)
    assert "was trained with tokenizer" in found.error and "small.model is another" in found.error
    assert contents(place.root) == before


def test_a_damaged_checkpoint_is_refused_when_a_run_goes_on_and_the_older_one_continues(
    place, script
):
    assert script("pretrain.py", *place.pretrain).code == 0
    run = place.root / "pretrain"
    wanted = contents(run / "step-000010")
    os.truncate(run / "step-000010/train_state.safetensors", 1000)
    before = contents(place.root)
    found = script("pretrain.py", *place.pretrain)
    assert "fails its checksum in train_state.safetensors" in found.error
    assert "delete it; use" in found.error and "step-000005" in found.error
    assert contents(place.root) == before
    shutil.rmtree(run / "step-000010")
    assert "continues at step 5" in script("pretrain.py", *place.pretrain).err
    assert contents(run / "step-000010") == wanted


def test_checkpoints_without_a_config_are_not_touched(place, script):
    before = contents(place.root)
    found = script("pretrain.py", *place.pretrain, "--name", place.root / "out/small")
    assert "has checkpoints but no config.yaml; take another --name" in found.error
    assert contents(place.root) == before


def test_a_place_that_cannot_be_written_is_one_line(place, script):
    (place.root / "file").write_text("")
    before = contents(place.root)
    found = script("pretrain.py", *place.pretrain, "--name", place.root / "file/run")
    assert str(place.root / "file") in found.error and "choose another place" in found.error
    assert contents(place.root) == before


def test_every_row_that_is_kept_has_a_target(place):
    """So a batch without targets cannot come from files; the loop bears one (test_trainer)."""
    sources = tuple(
        SourceConfig(str(place.root / "tokens" / kind)) for kind in ("chat", "summary", "text")
    )
    data = open_data(
        DataConfig(sources, SMALL_PROMPTS),
        place.tokenizer,
        128,
        TrainConfig(batch_size=4),
        READERS,
    )
    for source in data.train.mixture.sources:
        rows = [source.row(n, np.random.default_rng(n)) for n in range(len(source))]
        assert all((targets >= 0).any() for _, targets in rows)
