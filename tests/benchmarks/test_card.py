"""The script for cards, rehearsed without one: parts work, limits hold, figures stay."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from babyllama.errors import ConfigError
from benchmarks import card
from benchmarks.card import PARTS, CardConfig, Lab, Worker, lines_of, main

TINY = {"device": "cpu", "tiny": True, "short": True}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(CardConfig(**TINY))


@pytest.mark.parametrize("name", [name for name in PARTS if name != "resume"])
def test_a_part_gives_figures_that_pass(name: str, lab: Lab) -> None:
    figures = PARTS[name].act(lab)
    assert figures.get("passed", True) and json.loads(json.dumps(figures)) == figures
    lines = lines_of(name, figures)
    assert lines[0].startswith(name) and len(lines) >= 1


def test_a_run_that_went_on_is_the_same_with_what_is_asked_of_cards(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], card.train

    def run(*given: Any) -> int:
        asked.append(given[3].device.deterministic)
        return real(*given)

    monkeypatch.setattr(card, "train", run)
    monkeypatch.setattr(lab, "is_card", True)
    assert card.resumed(lab) == {"default": 0, "deterministic": 0, "passed": True}
    assert asked == [False, False, True, True]


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
    monkeypatch.setenv("PATH", str(tmp_path))  # a container has no git
    parts = {"machine": {"device": "cpu"}, "resume": {"default": 1e-3, "passed": False}}
    for names, code in ((["machine"], 0), (["machine", "resume"], 1)):
        made = ((name, parts[name]) for name in names)
        monkeypatch.setattr(card, "measured", lambda _, made=made: made)
        out = tmp_path / "card.json"
        assert main(CardConfig(**TINY, out=out)) == code
        found = json.loads(out.read_text("utf-8"))
        assert {name: found[name] for name in names} == {name: parts[name] for name in names}
        assert found["commit"] == "no commit"
        said = capsys.readouterr()
        assert json.loads(said.out.strip().splitlines()[-1]) == found
        assert ("failed: resume" in said.err) == bool(code)
