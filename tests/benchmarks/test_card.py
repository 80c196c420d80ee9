"""The script for cards, rehearsed without one: parts work, limits hold, figures stay."""

import json
import time
from pathlib import Path

import pytest

from babyllama.errors import ConfigError
from benchmarks import card
from benchmarks.card import PARTS, CardConfig, Lab, Worker, lines_of, main

TINY = {"device": "cpu", "tiny": True, "short": True}
QUICK = ("machine", "correct", "optimizers", "images", "largest")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(CardConfig(**TINY))


@pytest.mark.parametrize("name", QUICK)
def test_a_part_gives_figures_that_pass(name: str, lab: Lab) -> None:
    figures = PARTS[name].act(lab)
    assert figures.get("passed", True) and json.loads(json.dumps(figures)) == figures
    lines = lines_of(name, figures)
    assert lines[0].startswith(name) and len(lines) >= 1


def test_parts_fit_the_time_of_the_script() -> None:
    assert sum(part.short for part in PARTS.values()) <= 340
    assert all(0 < part.short <= part.full for part in PARTS.values())
    with pytest.raises(ConfigError, match="wanted some of machine"):
        CardConfig(parts="machine,no such part")


def test_a_part_that_hangs_is_ended_and_what_is_known_is_kept(tmp_path: Path) -> None:
    worker = Worker(CardConfig(**TINY), ["machine"])
    started = time.monotonic()
    assert "not finished after 0 s" in worker.figures(0.01)["fault"]
    worker.stop()
    assert time.monotonic() - started < 20


def test_the_script_writes_figures_and_fails_where_a_part_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"machine": {"device": "cpu"}, "resume": {"default": 1e-3, "passed": False}}
    for names, code in ((["machine"], 0), (["machine", "resume"], 1)):
        made = ((name, parts[name]) for name in names)
        monkeypatch.setattr(card, "measured", lambda _, made=made: made)
        out = tmp_path / "card.json"
        assert main(CardConfig(**TINY, out=out)) == code
        found = json.loads(out.read_text("utf-8"))
        assert {name: found[name] for name in names} == {name: parts[name] for name in names}
        said = capsys.readouterr()
        assert json.loads(said.out.strip().splitlines()[-1]) == found
        assert ("failed: resume" in said.err) == bool(code)
