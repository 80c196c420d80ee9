"""Laws of the benchmarks that train several models: what they fit, refuse, and do not repeat."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from babyllama.errors import CheckpointError, ConfigError
from benchmarks import scaling, vocabularies
from benchmarks.scaling import Point, fit, read, require_same_data, table
from conftest import TEXTS

POINT = Point("r", "64x2", 600_000, 1_000, 1e9, 5.0, 2.0)


def points(a: float, b: float) -> list[Point]:
    return [
        replace(POINT, parameters=n, tokens=d, bits=3 * n**a * d**b)
        for n in (10**5, 10**6, 10**7) for d in (10**5, 10**6)
    ]  # fmt: skip


@pytest.mark.parametrize("a, b", [(-0.05, -0.1), (-0.2, -0.01)])
def test_a_power_law_is_found_again(a, b):
    said = fit(points(a, b))
    assert f"N^{a:.3f} D^{b:.3f}, at most 0.0% off" in said
    assert f"parameters {2**a - 1:+.1%}, twice the tokens {2**b - 1:+.1%}" in said


def test_what_is_no_power_law_is_said_to_be_off():
    first, *others = points(-0.1, -0.1)
    assert "at most 0.0% off" not in fit([replace(first, bits=2 * first.bits), *others])


def test_one_size_is_not_enough_for_a_law():
    assert "no fit" in fit([p for p in points(-0.1, -0.1) if p.parameters == 10**6])


def test_a_run_without_rouge_has_an_empty_cell():
    *_, without, with_it = table([POINT, replace(POINT, rouge=12.34)]).split("\n")
    assert without.endswith("| 2.000 |  |") and with_it.endswith("| 2.000 | 12.3 |")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": ["a"]}}), "utf-8")
    return tmp_path


@pytest.mark.parametrize("last", [None, {"kind": "train", "step": 5}, {"kind": "val", "step": 0}])
def test_a_run_that_has_not_ended_is_refused(place, last):
    (place / "metrics.jsonl").write_text(json.dumps(last) + "\n" if last else "", "utf-8")
    with pytest.raises(CheckpointError, match="wanted a run that ended with an evaluation"):
        read(place)


def finished(place: Path, tokens: int, base: Path | None = None) -> Path:
    """A run directory as pretrain.py leaves it, as far as `read` looks."""
    place.mkdir()
    shape = {"dim": 32, "n_layers": 1, "n_heads": 1, "vocab_size": 64, "max_seq_len": 16}
    config = {"base": str(base) if base else None, "model": shape, "data": {"sources": ["a"]}}
    (place / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    records = [{"kind": "train", "step": 5, "tokens": tokens},
               {"kind": "val", "step": 5, "loss": 3.0, "bpb": 1.5}]  # fmt: skip
    (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    return place


def test_the_tokens_of_a_base_count_too(tmp_path):
    first = finished(tmp_path / "first", 1000)
    (first / "step-000005").mkdir()
    for name, base in (("on", first), ("on_from_a_step", first / "step-000005")):
        found = read(finished(tmp_path / name, 500, base))
        assert found.tokens == 1500 and found.flops == pytest.approx(1.5 * read(first).flops)


def test_runs_on_other_data_are_refused(place, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": ["b"]}}), "utf-8")
    require_same_data([place, place])
    with pytest.raises(ConfigError, match=r"read other data .*data.sources"):
        require_same_data([place, other])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of a moment: two short rows a step."""
    shape = {"dim": 32, "n_layers": 1, "n_heads": 1, "multiple_of": 16, "max_seq_len": 64}
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(shape | {"tied": True}), "utf-8")
    path = tmp_path / "recipe.yaml"
    content = {
        "name": "recipe", "tokenizer": "none", "model": "shape.yaml",
        "optim": {"name": "muon", "lr": 1e-2, "warmup_steps": 10},
        "train": {"batch_size": 2, "micro_batch_size": 2},
        "device": {"device": "cpu", "precision": "float32"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


@pytest.mark.slow
def test_sizes_and_token_counts_are_trained_once(recipe, token_root, tokenizer, tmp_path, capfd):
    data = tmp_path / "data.yaml"
    sources = [{"name": str(token_root / "text")}]
    content = {"tokenizer": str(tokenizer.path), "data": {"sources": sources}}
    data.write_text(yaml.safe_dump(content), "utf-8")
    cfg = scaling.ScalingConfig(
        data, recipe, ("32x1", "32x2"), (10_240, 20_480), str(tmp_path / "s"),
        out=tmp_path / "scaling.png",
    )  # fmt: skip
    scaling.main(cfg)
    said = capfd.readouterr()
    first = json.loads(said.out.strip().split("\n")[-1])
    assert [p["tokens"] for p in first] == [10_240, 20_480] * 2
    assert [p["shape"] for p in first] == ["32x1", "32x1", "32x2", "32x2"]
    assert first[0]["bits"] > first[1]["bits"] and first[0]["flops"] * 2 == first[1]["flops"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    weights = [path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")]
    scaling.main(cfg)
    said = capfd.readouterr()
    assert json.loads(said.out.strip().split("\n")[-1]) == first
    assert said.err.count("is finished") == 4
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")] == weights


@pytest.mark.slow
def test_vocabularies_are_trained_for_the_same_time(recipe, tmp_path, capfd):
    rows = tmp_path / "root/clean/text"
    rows.mkdir(parents=True)
    for part, n in (("train", 60), ("val", 4)):
        lines = (
            json.dumps({"id": f"text/{k}", "text": f"{text}{k}"}, ensure_ascii=False)
            for k in range(n)
            for text in TEXTS
        )
        (rows / f"{part}-00000.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (rows / "counts.json").write_text(json.dumps({"reader": "text"}), "utf-8")
    cfg = vocabularies.VocabulariesConfig(
        tmp_path / "root", ("text",), (400, 450), (), 1.0, recipe, str(tmp_path / "v")
    )
    vocabularies.main(cfg)
    *_, small, large, figures = capfd.readouterr().out.strip().split("\n")
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in (small, large)]
    assert [row[1] for row in cells] == ["400", "450"]
    assert float(cells[0][3]) < float(cells[1][3]), "more pieces, more bytes a token"
    assert all(0 < float(row[-1]) < 8 for row in cells)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.model")}
    vocabularies.main(cfg)
    said = capfd.readouterr()
    assert said.err.count("is finished") == 2 and said.out.strip().endswith(f"{large}\n{figures}")
    assert {path: path.stat().st_mtime_ns for path in before} == before
