"""What a run leaves to read: lines or a bar, metrics.jsonl without holes, a real image."""

import functools
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from babyllama import brought_by, language, log
from babyllama.analysis.watch import (
    FONTS,
    LABELS,
    WATCH,
    cjk_font,
    draw_curves,
    label,
    plot_font,
)
from babyllama.log import read_metrics, read_records

Log = functools.partial(log.Log, watch=WATCH)
FIGURES = {"loss": 2.5, "ppl": 12.18, "accuracy": 0.25, "n_targets": 640, "tokens_per_s": 12345.6}


def write(run: Path, log: "log.Log", first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(step)
        log.record("train", step, FIGURES | {"loss": 5.0 / step, "lr": 1e-3})


def test_without_a_terminal_each_record_is_a_plain_line(tmp_path, capsys):
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


def test_with_a_terminal_there_is_one_bar_with_the_newest_figures(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    log = Log(tmp_path, 2, 4)
    write(tmp_path, log, 3, 4)
    log.close(0, "done")
    text = terminal.getvalue()
    assert "4/4" in text and "loss 1.25" in text.split("\r")[-1]
    assert text.endswith("done\n") and (tmp_path / "curves.png").exists()
    assert tmp_path.name in text and "train step" not in text


def test_later_records_are_dropped_when_a_run_goes_on(tmp_path):
    write(tmp_path, Log(tmp_path, 0, 9), 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # cut by a kill
    write(tmp_path, Log(tmp_path, 3, 9), 4, 6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in read_metrics(tmp_path, 2)] == [1, 2]


def test_a_run_of_which_nothing_was_saved_begins_its_records_anew(tmp_path):
    log = Log(tmp_path, 0, 9)
    log.record("val", 0, FIGURES)
    assert Log(tmp_path, 0, 9).records == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_the_main_process_speaks_and_writes(tmp_path, capsys):
    log = Log(tmp_path, 0, 4, is_main=False)
    write(tmp_path, log, 1, 2)
    log.say("hello")
    log.draw()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_curves_are_a_real_picture_that_shows_the_figures(tmp_path):
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


def test_a_single_validation_can_be_drawn(tmp_path):
    draw_curves([{"kind": "val", "step": 0, **FIGURES}], tmp_path / "curves.png", "first")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 1000


def test_the_curves_are_redrawn_while_a_run_goes_on(tmp_path, monkeypatch):
    log = Log(tmp_path, 0, 4)
    log.record("val", 0, FIGURES)
    assert not (tmp_path / "curves.png").exists()
    monkeypatch.setattr("babyllama.log._REDRAW_S", 0)
    log.record("val", 1, FIGURES)
    assert (tmp_path / "curves.png").exists()


def test_samples_are_kept_by_step_and_dropped_with_what_was_not_saved(tmp_path):
    log = Log(tmp_path, 0, 9)
    for step in (0, 5, 8):
        log.samples(step, [("今天", f"天气{step}"), ("你好", "再见")])
    assert "今天" in (tmp_path / "samples.jsonl").read_text("utf-8")  # legible
    Log(tmp_path, 5, 9)
    found = read_records(tmp_path / "samples.jsonl")
    assert [(r["step"], r["prompt"], r["reply"]) for r in found][2:] == [
        (5, "今天", "天气5"),
        (5, "你好", "再见"),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "swanlab", "wandb"])
def test_a_service_that_is_not_installed_names_the_file_to_install(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        Log(tmp_path, 0, 4, track=name)
    assert brought_by(missing.value.name) == "requirements/track.txt"  # which `run` says


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_figures_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, 0, 4, track="tensorboard")
    log.record("val", 3, {**FIGURES, "sources": {"inews": 2.0}})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("val/loss")] == [(3, 2.5)]
    assert found.Scalars("val/loss/inews")[0].value == 2.0


def test_figures_go_to_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Log(tmp_path, 0, 4, track="wandb")
    log.record("val", 3, {**FIGURES, "sources": {"inews": 2.0}})
    log.record("train", 4, FIGURES)  # a later step sends the one before
    run, found = wandb.run, dict(wandb.run.summary)
    wandb.finish()
    assert run.name == tmp_path.name
    assert {key: found[key] for key in ("val/loss", "val/loss/inews", "_step")} == {
        "val/loss": 2.5,
        "val/loss/inews": 2.0,
        "_step": 3,
    }
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_records_that_were_cut_anywhere_do_not_keep_a_run_from_going_on(tmp_path):
    log = Log(tmp_path, 0, 9)
    write(tmp_path, log, 1, 3)
    for step in (1, 2, 3):
        log.samples(step, [("今天", "天气很好")])
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    last = {name: data.rindex(b"\n", 0, -1) for name, data in whole.items()}
    for n in range(1, 45):  # byte by byte, through every character
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data[:-n])
        log = Log(tmp_path, 3, 9)
        kept = read_records(tmp_path / "samples.jsonl")
        assert [r["step"] for r in kept] == ([1, 2, 3] if n == 1 else [1, 2])
        assert (
            (tmp_path / "samples.jsonl")
            .read_bytes()
            .startswith(whole["samples.jsonl"][: last["samples.jsonl"]])
        )
    for line in (b"5\n", b"{}\n", b'{"step": "x"}\n', b"\xff\n"):  # edited by hand
        (tmp_path / "metrics.jsonl").write_bytes(line + whole["metrics.jsonl"])
        assert [r["step"] for r in read_metrics(tmp_path, 9)] == [1, 2, 3]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_whose_reader_has_gone_goes_on(is_terminal, tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w", buffering=1) as pipe:
        pipe.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stderr", pipe)
        log = Log(tmp_path, 0, 4)
        write(tmp_path, log, 1, 4)
        log.record("val", 4, FIGURES)
        log.close(0, "done")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]
    assert (tmp_path / "curves.png").exists()


def test_labels_of_plots_speak_the_language_of_the_user(monkeypatch):
    assert plot_font("run") is None and label(LABELS["loss"], "a font") == "loss a token"
    monkeypatch.setattr(sys, "stderr", language.Door(sys.stderr, language._chinese()))
    assert plot_font("run") == cjk_font()
    for text in (*LABELS.values(), "training step"):
        assert not label(text, "a font").isascii() and label(text, None) == text


def test_only_a_font_that_has_the_characters_is_found(monkeypatch):
    font = cjk_font()
    if font:
        path = font_manager.findfont(font, fallback_to_default=False)
        assert all(font_manager.get_font(path).get_char_index(ord(c)) for c in "数据集训练")
    latin = [f for f in font_manager.fontManager.ttflist if f.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(latin))
    if font:
        assert cjk_font()  # by its file, where matplotlib's list is older than the font
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [latin[0].fname])
    assert cjk_font() is None
    gone = SimpleNamespace(name=FONTS[0], fname="/no/such/font.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [gone])
    assert cjk_font() is None


def test_curves_of_a_run_with_a_chinese_name_are_drawn_without_a_warning(tmp_path):
    """Warnings are errors; without a Chinese font the name is spelled out."""
    records = [
        {"kind": kind, "step": step, **FIGURES, "sources": {"新闻": 2.0, "闲聊": 3.0}}
        for step in (0, 10)
        for kind in ("train", "val")
    ]
    draw_curves(records, tmp_path / "curves.png", "试验")
    draw_curves(records, tmp_path / "other.png", "run")
    assert (tmp_path / "curves.png").read_bytes() != (tmp_path / "other.png").read_bytes()
