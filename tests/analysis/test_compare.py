"""Runs side by side: the settings that differ and the figures."""

import json
from pathlib import Path

import pytest
import yaml

from babyllama.analysis.compare import CompareConfig, main
from babyllama.config import parse
from babyllama.errors import ConfigError


def write_run(run: Path, lr: float, loss: float, **more: object) -> Path:
    run.mkdir(parents=True)
    config = {"name": run.name, "optim": {"lr": lr, "warmup_steps": 2}, **more}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"kind": "val", "step": 0, "loss": 5.0, "bpb": 3.0},
        {"kind": "train", "step": 1, "loss": 4.5, "tokens": 640, "tokens_per_s": 100.0},
        {"kind": "val", "step": 1, "loss": loss, "bpb": 2.5},
        {"kind": "train", "step": 2, "loss": 4.1, "tokens": 1280, "tokens_per_s": 300.0},
        {"kind": "val", "step": 2, "loss": loss + 0.5, "bpb": 2.75},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def test_only_what_differs_is_listed_with_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", 0.1, 4.0)
    b = write_run(tmp_path / "b", 0.2, 3.5, extra={"deep": [1]})
    main(CompareConfig((a, b)))
    head, *lines = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert head == f"{a} {b}"
    assert "optim.lr 0.1 0.2" in lines and "extra.deep - [1]" in lines
    assert not any("warmup_steps" in line for line in lines)
    assert "val loss, best 4.0000 (step 1) 3.5000 (step 1)" in lines
    assert "val loss, last 4.5000 (step 2) 4.0000 (step 2)" in lines
    assert "tokens seen 1,280 1,280" in lines


def test_one_run_or_none_cannot_be_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0.1, 4.0)
    with pytest.raises(ConfigError, match="two runs or more"):
        main(CompareConfig((run,)))
    with pytest.raises(ConfigError, match=r"nothing: wanted the directory of a run"):
        main(CompareConfig((run, tmp_path / "nothing")))


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: &a [1]\nb: *a", "\x00"])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "a", 0.1, 4.0)
    other = write_run(tmp_path / "b", 0.1, 4.0)
    (other / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"b/config\.yaml: wanted the settings of a run"):
        main(CompareConfig((run, other)))


def test_runs_are_named_without_a_flag() -> None:
    cfg = parse(CompareConfig, "", ["out/a", "out/b"], positional=("runs",))
    assert cfg.runs == (Path("out/a"), Path("out/b"))
