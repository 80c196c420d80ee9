"""What a run leaves to read: lines or a bar, metrics.jsonl without holes, a real picture."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from babyllama.log import Log, draw_curves, read_metrics, written_whole

FIGURES = {"loss": 2.5, "ppl": 12.18, "accuracy": 0.25, "n_targets": 640, "tokens_per_s": 12345.6}


def write(run: Path, log: Log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(step)
        log.record("train", step, FIGURES | {"loss": 5.0 / step, "lr": 1e-3})


def test_without_a_terminal_each_record_is_a_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, 0, 4)
    log.record("val", 0, FIGURES)
    write(tmp_path, log, 1, 4)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 5
    assert "\r" not in err and "\x1b" not in err
    assert lines[0] == "  val step 0/4  loss 2.5  ppl 12.2  accuracy 0.25  tokens_per_s 12346"
    assert lines[2].startswith("train step 2/4  loss 2.5  ppl 12.2  accuracy 0.25  lr 0.001")
    assert lines[2].split()[-2] == "left"


def test_with_a_terminal_there_is_one_bar_with_the_newest_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    log = Log(tmp_path, 2, 4)
    write(tmp_path, log, 3, 4)
    log.close("done")
    text = terminal.getvalue()
    assert "4/4" in text and "loss 1.25" in text.split("\r")[-1]
    assert text.endswith("done\n") and (tmp_path / "curves.png").exists()
    assert tmp_path.name in text and "train step" not in text


def test_later_records_are_dropped_when_a_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, Log(tmp_path, 0, 9), 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # cut by a kill
    write(tmp_path, Log(tmp_path, 3, 9), 4, 6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in read_metrics(tmp_path, 2)] == [1, 2]


def test_a_run_of_which_nothing_was_saved_begins_its_records_anew(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 9)
    log.record("val", 0, FIGURES)
    assert Log(tmp_path, 0, 9).records == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_the_main_process_speaks_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, 0, 4, is_main=False)
    write(tmp_path, log, 1, 2)
    log.say("hello")
    log.draw()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_curves_are_a_real_picture_that_shows_the_figures(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 30)
    write(tmp_path, log, 1, 30)
    log.record("val", 30, FIGURES)
    log.draw()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    assert width > 1000 and height > 300
    blue = (pixels[..., 2].astype(int) - pixels[..., 0]) > 60  # the line of the training figures
    assert all(blue[:, part].any() for part in np.array_split(np.arange(width), 3))
    draw_curves(log.records[:15], tmp_path / "other.png", "half")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "curves.png").read_bytes()
    assert not list(tmp_path.glob("tmp-*"))


def test_a_single_validation_can_be_drawn(tmp_path: Path) -> None:
    draw_curves([{"kind": "val", "step": 0, **FIGURES}], tmp_path / "curves.png", "first")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 1000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), written_whole(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
