"""The matrix of forgetting: its figures are those of a slow reference, its picture is drawn."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from babyllama.analysis.forgetting import changes, draw, forgotten, table
from babyllama.checkpoint import load_model, save_checkpoint
from babyllama.config import REPO, from_repo, parse
from babyllama.log import cjk_font
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.sources import DataConfig, SourceConfig, open_source
from conftest import small_config, write_token_files
from model import IGNORED, Transformer
from sft import SftConfig
from tokenizer import Tokenizer

SCRIPT = "babyllama/analysis/forgetting.py"


def save(run: Path, step: int, tokenizer, seed: int, parent: Path | None = None) -> Path:
    """A checkpoint with the random weights of a seed."""
    torch.manual_seed(seed)
    model = Transformer(small_config(tokenizer.vocab_size))
    optimizer = make_optimizer(model, OptimConfig())
    return save_checkpoint(
        run, step, model, tokenizer, optimizer, {"tokens": 0}, "sft",
        parent and str(parent), keep=9,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run of two steps that began with another run's checkpoint."""
    base = save(tmp_path / "base", 3, tokenizer, seed=0)
    for step in (5, 10):
        save(tmp_path / "run", step, tokenizer, seed=step, parent=base)
    return tmp_path / "run"


def sources(token_root: Path, *names: str) -> str:
    return ",".join(str(token_root / name) for name in names)


def slow_figures(step: Path, source: Path) -> tuple[float, float, int]:
    """Loss, accuracy and number of targets, a row at a time."""
    loaded = load_model(step)
    rows = open_source(SourceConfig(str(source)), "val", loaded.tokenizer, DataConfig(), 128)
    losses, hits = [], []
    for number in range(len(rows)):
        tokens, targets = rows.row(number, np.random.default_rng((0, number)))
        keep = targets != IGNORED
        with torch.no_grad():
            logits = loaded.model(torch.from_numpy(tokens)[None])[0][torch.from_numpy(keep)]
        goal = torch.from_numpy(targets[keep])
        losses += F.cross_entropy(logits, goal, reduction="none").tolist()
        hits += (logits.argmax(-1) == goal).tolist()
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def test_a_run_is_measured_from_the_checkpoint_it_began_with(run, token_root, script):
    names = ("chat", "summary", "text")
    done = script(SCRIPT, run, "--sources", sources(token_root, *names), "--batch-size", 3)
    assert done.code == 0, done.err
    found = json.loads((run / "forgetting.json").read_text("utf-8"))
    steps = [run.parent / "base/step-000003", run / "step-000005", run / "step-000010"]
    assert [from_repo(path) for path in found["figures"]] == steps
    for step, row in zip(steps, found["figures"].values(), strict=True):
        for name in names:
            figures = row[str(token_root / name)]
            loss, accuracy, n_targets = slow_figures(step, token_root / name)
            assert figures["loss"] == pytest.approx(loss, rel=1e-5)
            assert figures["ppl"] == pytest.approx(np.exp(loss), rel=1e-4)
            assert figures["accuracy"] == pytest.approx(accuracy)
            assert figures["n_targets"] == n_targets
            assert f"{loss:.3f}" in done.out and f"({n_targets:,} targets)" in done.out
    size = struct.unpack(">II", (run / "forgetting.png").read_bytes()[16:24])
    assert (run / "forgetting.png").read_bytes()[:4] == b"\x89PNG" and min(size) > 300


def test_runs_stand_for_their_newest_step_and_know_their_sources(run, token_root, script, tmp_path):
    config = f"data:\n  sources:\n  - {{name: {token_root / 'chat'}, weight: 2.0}}\n"
    (run / "config.yaml").write_text(config, "utf-8")
    done = script(SCRIPT, tmp_path / "base", run, "--out", tmp_path / "new/matrix")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "new/matrix.json").read_text("utf-8"))
    assert [Path(path).name for path in found["figures"]] == ["step-000003", "step-000010"]
    assert list(found["forgotten"]) == [str(token_root / "chat")]
    assert (tmp_path / "new/matrix.png").is_file()


FIGURES = {
    step: {name: {"loss": loss, "bpb": 2 * loss, "ppl": 9.0, "accuracy": 0.5, "n_targets": 1234}
           for name, loss in zip(("对话", "csl"), losses, strict=True)}
    for step, losses in (("out/甲/step-1", (3.0, 6.0)), ("b", (2.0, 5.0)), ("c", (2.75, 3.0)))
}  # fmt: skip


def found(key: str) -> dict:
    return {
        "compared_by": key, "figures": FIGURES, "change": changes(FIGURES, key),
        "forgotten": forgotten(FIGURES, key),
    }  # fmt: skip


def test_change_is_since_the_first_and_forgotten_since_the_best_before_the_last():
    assert changes(FIGURES, "loss") == {
        "out/甲/step-1": {"对话": 0.0, "csl": 0.0},
        "b": {"对话": -1.0, "csl": -1.0},
        "c": {"对话": -0.25, "csl": -3.0},
    }
    assert forgotten(FIGURES, "loss") == {"对话": 0.75, "csl": -2.0}
    assert forgotten(FIGURES, "bpb") == {"对话": 1.5, "csl": -4.0}
    lines = table(found("loss")).splitlines()
    assert lines[0] == "对话 (1,234 targets)" and lines[5] == "  forgotten +0.750 (loss)"
    assert lines[4].split() == ["2.750", "9.00", "50.00%", "5.5000", "-0.250", "c"]


@pytest.mark.parametrize("key", ["loss", "bpb"])
def test_a_picture_needs_no_chinese_font(tmp_path, key):
    draw(found(key), tmp_path / "plain.png", None)  # a missing glyph would be a warning
    assert (tmp_path / "plain.png").stat().st_size > 5000
    font = cjk_font()
    if font is not None:
        draw(found(key), tmp_path / "chinese.png", font)
        assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "chinese.png").read_bytes()


def test_checkpoints_of_other_tokenizers_are_compared_by_bytes(
    run, token_root, script, tokenizer, tmp_path, monkeypatch
):
    """The same pieces under another fingerprint have token files of their own."""
    path = tmp_path / "other.model"
    path.write_bytes(tokenizer.bytes + b"\x22\x00")  # an empty field more
    other = Tokenizer(path)
    assert other.fingerprint != tokenizer.fingerprint
    monkeypatch.chdir(tmp_path)
    for model in (tokenizer, other):
        tokens = write_token_files(tmp_path / f"made-{model.path.stem}", model)
        shutil.copytree(tokens / "chat", f"data/tokens/{model.path.stem}/chat")
    save(tmp_path / "later", 1, other, seed=5)
    done = script(SCRIPT, run, tmp_path / "later", "--sources", "chat")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "later/forgetting.json").read_text("utf-8"))
    assert result["compared_by"] == "bpb"
    first, last = result["figures"].values()
    assert result["change"][list(result["figures"])[1]]["chat"] == pytest.approx(
        last["chat"]["bpb"] - first["chat"]["bpb"]
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "wanted two checkpoints or more to compare, found 0"),
        (("{run}/step-000005",), "wanted two checkpoints or more to compare, found 1"),
        (("{run}", "{run}/none"), "no such checkpoint"),
        (("{run}",), "wanted sources to measure, found none"),
        (("{run}", "--sources", " , "), "wanted sources to measure, found none"),
        (("{run}", "--sources", "{run}/nothing"), "wanted token files val-*.idx, found none"),
        (("{run}", "--batch_size", "0"), "--batch_size wants 1 or more, found 0"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_writes_nothing(run, script, words, message):
    before = sorted(run.rglob("*"))
    assert message in script(SCRIPT, *(word.format(run=run) for word in words)).error
    assert sorted(run.rglob("*")) == before


def test_runs_one_after_another_are_held_against_a_mixture(tmp_path, token_root, tokenizer, script):
    """Every step is on a curve, the ends of the stages are in the table and the heat map."""
    out = tmp_path / "out"
    base = save(out / "base", 7, tokenizer, seed=0)
    for name, steps in (("a", (5, 10)), ("b", (5, 8)), ("mix", (9, 18))):
        for step in steps:
            save(out / name, step, tokenizer, seed=step + 100 * len(name), parent=base)
    sources = f"{token_root / 'chat'},{token_root / 'summary'}"
    words = (base, out / "a", out / "b", "--against", out / "mix", "--sources", sources)
    done = script(SCRIPT, *words, "--out", tmp_path / "curves")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "curves.json").read_text("utf-8"))
    curves = result["curves"]
    assert [n for n, _ in curves["sequence"]] == [0, 5, 10, 15, 18]
    assert [n for n, _ in curves["against"]] == [0, 9, 18]
    ends = [str(Path(step).relative_to(out)) for step in result["figures"]]
    assert ends == ["base/step-000007", "a/step-000010", "b/step-000008", "mix/step-000018"]
    loss = {step: row[str(token_root / "chat")]["loss"] for step, row in result["steps"].items()}
    first, *_, last, mixed = [loss[step] for step in result["figures"]]
    before = [loss[step] for step in list(result["figures"])[:2]]
    assert result["forgotten"][str(token_root / "chat")] == pytest.approx(last - min(before))
    half = loss[curves["against"][1][1]]
    lost = mixed - min(first, half)
    assert result["forgotten_against"][str(token_root / "chat")] == pytest.approx(lost)
    assert f"by --against {lost:+.3f}" in done.out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    alone = script(SCRIPT, base, "--against", out / "mix", "--sources", sources)
    assert "wanted two checkpoints or more" in alone.error


@pytest.mark.parametrize("path", sorted((REPO / "configs/forgetting").glob("*.yaml")), ids=str)
def test_the_committed_experiment_is_read_and_its_stages_follow_each_other(path):
    cfg = parse(SftConfig, "", ["--config", str(path)])
    assert cfg.train.keep * cfg.train.save_every >= cfg.train.max_steps
    names = {c.name for c in (parse(SftConfig, "", ["--config", str(p)])
                              for p in path.parent.glob("*.yaml"))}  # fmt: skip
    assert cfg.base is None or cfg.base.name in names
