"""Runs side by side: each is trained once, and the table says what their own files say."""

import json
import shlex
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file

from babyllama.config import REPO, parse, plain
from babyllama.rows import write_rows
from babyllama.run_dir import list_checkpoints
from benchmarks.sft_table import TableConfig, main
from conftest import TEXTS, write_run
from sft import SftConfig


@pytest.fixture
def cfg(tmp_path, token_root, checkpoint) -> TableConfig:
    """Two runs of ten steps, and six texts whose titles are their beginnings."""
    shared = write_run(tmp_path / "shared.yaml", token_root, save_every=2, keep=3)
    titles = [{"id": str(i), "text": t, "summary": t[:6]} for i, t in enumerate(TEXTS)]
    write_rows(tmp_path / "titles.jsonl", titles)
    return TableConfig(
        settings=shared,
        titles=tmp_path / "titles.jsonl",
        name=str(tmp_path / "runs"),
        flags=f"--base {checkpoint} --train.samples []",
        runs={"all weights": "", "LoRA, rank 2": "--lora.rank 2 --optim.lr 1e-3"},
        mean_of_last=2,
    )


@pytest.mark.slow
def test_every_run_is_trained_once_and_stands_in_the_table(cfg, tmp_path, capfd):
    main(cfg)
    out = capfd.readouterr().out
    names = ["all weights", "LoRA, rank 2", "mean of its last 2"]
    cells = [line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("| ")]
    assert cells[2:] == names
    found = json.loads((tmp_path / "runs/table.json").read_text("utf-8"))["rows"]
    assert list(found) == names and "difference" not in found["all weights"]
    runs = [tmp_path / "runs/all_weights", tmp_path / "runs/lora_rank_2"]
    for name, run in zip(names, runs, strict=False):
        last = list_checkpoints(run)[-1]
        weights = load_file(next(last.glob("[am]*.safetensors")))
        assert found[name]["n_trained"] == sum(w.numel() for w in weights.values())
        val = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        val = [row for row in val if row["kind"] == "val"][-1]
        assert found[name]["loss"] == pytest.approx(val["loss"], rel=1e-5)
        assert found[name]["accuracy"] == pytest.approx(val["accuracy"], rel=1e-5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    main(cfg)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.safetensors")}


def test_a_run_that_is_refused_is_named(cfg, tmp_path, script):
    table = plain(replace(cfg, runs={"none": "--lora.rank 0"}))
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table), "utf-8")
    found = script("benchmarks/sft_table.py", "--config", tmp_path / "table.yaml")
    assert found.code == 2 and "the run 'none' ended with exit code 2" in found.err
    assert "lora.rank wants 1 or more" in found.err


def test_a_table_without_runs_is_refused(script):
    flags = ("--settings", "configs/compare/csl.yaml", "--titles", "x")
    assert "wanted a config with `runs`" in script("benchmarks/sft_table.py", *flags).error


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/compare/*.yaml")), ids=lambda p: p.name)
def test_a_committed_comparison_is_read(path):
    if path.name == "csl.yaml":
        shared = parse(SftConfig, "", ["--config", str(path)])
        assert len(shared.data.sources) == 2
        return
    cfg = parse(TableConfig, "", ["--config", str(path), "--titles", "x"])
    for flags in cfg.runs.values():
        words = ["--config", str(REPO / cfg.settings), *shlex.split(cfg.flags), *shlex.split(flags)]
        parse(SftConfig, "", words)
    keep = parse(SftConfig, "", ["--config", str(REPO / cfg.settings)]).train.keep
    assert keep >= cfg.mean_of_last
