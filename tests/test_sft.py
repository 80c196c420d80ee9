"""The command line of sft.py: which sets, with which settings, and what --inspect shows of them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from babyllama.analysis.inspect_batch import dialogue, read_of, shown_batch
from babyllama.analysis.terminal_text import GREEN, RESET
from babyllama.config import REPO, parse, to_yaml
from babyllama.data import open_data
from babyllama.errors import ConfigError
from babyllama.run_dir import list_checkpoints
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import TrainConfig
from conftest import SMALL_PROMPTS, write_run
from data_process.registry import catalog, weighted_names
from sft import SftConfig, resolve, settings_of
from tokenizer import Tokenizer


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("csl", [("csl", 1.0)]),
        ("csl:2,belle_multiturn:1", [("csl", 2.0), ("belle_multiturn", 1.0)]),
        (" csl : 2 , belle ", [("csl", 2.0), ("belle", 1.0)]),
        ("csl:0.5,belle", [("csl", 0.5), ("belle", 1.0)]),
        ("data/tokens/x/csl:3", [("data/tokens/x/csl", 3.0)]),
        (r"C:\tokens\csl", [(r"C:\tokens\csl", 1.0)]),
        ("csl:zwei", None),
        ("csl:", None),
        ("csl,csl:2", None),
        (",", None),
    ],
)
def test_sets_are_named_with_their_weights(text, wanted):
    if wanted is None:
        with pytest.raises(ConfigError, match="--dataset"):
            weighted_names(text)
    else:
        assert list(weighted_names(text).items()) == wanted


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_set_without_weight_is_refused(weight, tmp_path):
    with pytest.raises(ConfigError, match=r"'belle' has weight .*leave the source out"):
        resolve(SftConfig(dataset=f"csl,belle:{weight}", base=tmp_path))


def test_several_sets_take_the_settings_of_the_first_and_a_name_of_all(tmp_path):
    argv = ["--dataset", "csl:2,belle_multiturn:0.5", "--base", str(tmp_path)]
    cfg = resolve(parse(SftConfig, "", [*settings_of(argv), *argv]))
    assert cfg.data.sources == (SourceConfig("csl", 2.0), SourceConfig("belle_multiturn", 0.5))
    assert cfg.name == "csl+belle_multiturn"
    assert cfg.train.epochs == resolved("csl", tmp_path).train.epochs
    # What a run saves starts the same run again.
    (tmp_path / "saved.yaml").write_text(to_yaml(cfg), "utf-8")
    assert resolve(parse(SftConfig, "", ["--config", str(tmp_path / "saved.yaml")])) == cfg


def test_a_config_with_sources_of_its_own_is_taken_by_its_name(tmp_path):
    cfg = resolved("csl_lora", tmp_path)
    assert [source.name for source in cfg.data.sources] == ["csl"] and cfg.lora.rank == 16


def resolved(dataset: str, base: Path) -> SftConfig:
    argv = ["--dataset", dataset, "--base", str(base)]
    return resolve(parse(SftConfig, "", [*settings_of(argv), *argv]))


def own_settings() -> dict[str, dict]:
    """The sets that have settings of their own, by a file or by a line of the table."""
    found = yaml.safe_load((REPO / "configs/sft/datasets.yaml").read_text("utf-8"))
    for path in (REPO / "configs/sft").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text("utf-8"))
        if "dataset" in settings:
            found[path.stem] = {"train.epochs": settings["train"]["epochs"]}
    return {name: settings for name, settings in sorted(found.items()) if name != "all"}


@pytest.mark.parametrize("name", own_settings())
def test_a_set_brings_its_settings(name, tmp_path):
    cfg = resolved(name, tmp_path)
    assert cfg.name == name and cfg.data.sources == (SourceConfig(name),)
    assert name in catalog()
    assert 0 < cfg.train.epochs <= 10 and 1e-4 <= cfg.optim.lr <= 1e-3
    assert cfg.train.epochs == own_settings()[name].get("train.epochs", 3)
    assert cfg.train.micro_batch_size == 16


def test_the_sets_that_are_spoken_of_have_settings():
    wanted = {"redgpt", "naturalconv", "pclue", "belle", "belle_multiturn", "deepctrl", "csl"}
    assert wanted | {"lcsts"} <= own_settings().keys()


def test_all_missing_sets_are_named_with_their_commands(checkpoint, script):
    found = script("sft.py", "--dataset", "quac:2,boolq", "--base", checkpoint).error
    model = f"--tokenizer {checkpoint}/tokenizer.model"
    commands = [f"python -m data_process.run {name} {model}" for name in ("quac", "boolq")]
    assert found.endswith(f"make them: {commands[0]} && {commands[1]}")


def test_two_sets_train_with_their_weights(tmp_path, token_root, checkpoint, script):
    names = f"{token_root / 'chat'}:2,{token_root / 'summary'}:0.5"
    config = write_run(tmp_path / "run.yaml", token_root)
    done = script("sft.py", "--config", config, "--base", checkpoint, "--dataset", names)
    assert done.code == 0, done.err
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text("utf-8"))
    assert [source["weight"] for source in saved["data"]["sources"]] == [2.0, 0.5]
    assert len(list_checkpoints(tmp_path / "run")) == 2


@pytest.fixture
def data(token_root: Path, tokenizer: Tokenizer) -> Callable:
    """Training data of the three small sets."""

    def call(length: int = 112, **changes: object):
        sources = tuple(SourceConfig(str(token_root / n)) for n in ("text", "chat", "summary"))
        order = TrainConfig(batch_size=12)
        return open_data(
            DataConfig(sources, SMALL_PROMPTS, **changes), tokenizer, length, order, READERS
        ).train

    return call


def test_the_first_batch_is_shown_with_its_sources_and_what_is_learnt(data, tokenizer):
    train = data()
    sequences = train.sequences(0)
    lines = list(shown_batch(train, 99, tokenizer, False))
    heads = [line for line in lines if re.match(r"\[\d+\] ", line)]
    rows = [row for sequence in sequences for row in sequence]
    assert len(heads) == len(rows) == 12
    n_learnt = [int(re.search(r"(\d+) learnt", head)[1]) for head in heads]
    assert n_learnt == [int((targets >= 0).sum()) for _, targets in rows]
    placed = [train.mixture.place(n) for n in range(12)]
    wanted = sorted(f"{train.mixture.sources[s].name} row {number}" for _, s, number, _ in placed)
    assert sorted(re.search(r"\] (.*?)(?: copy \d+)?: ", head)[1] for head in heads) == wanted
    shown = [line for line in lines if line not in heads]
    for row in rows:
        ids, mask = read_of(row)
        assert (ids[:-1], ids[1:]) == (row[0].tolist()[: len(ids) - 1], ids[1:])
        assert [i for i, m in zip(ids, mask, strict=True) if m] == row[1][row[1] >= 0].tolist()
        assert dialogue(tokenizer, (ids, mask), False) in shown
    assert f"{sum(n_learnt):,} of" in lines[0]


def test_no_more_sequences_are_shown_than_asked_for(data, tokenizer):
    train = data()
    lines = list(shown_batch(train, 1, tokenizer, False))
    assert sum("positions ·" in line for line in lines) == 1
    assert f"{len(train.sequences(0)) - 1} more sequences" in lines[-1]


def test_colours_mark_the_targets(data, tokenizer):
    lines = "\n".join(shown_batch(data(), 99, tokenizer, True))
    assert GREEN in lines and RESET in lines and "⟦" not in lines


def test_inspecting_shows_the_batch_and_trains_nothing(
    tmp_path, token_root, checkpoint, script, monkeypatch
):
    monkeypatch.setenv("NO_COLOR", "1")
    config = write_run(tmp_path / "run.yaml", token_root)
    done = script("sft.py", "--config", config, "--base", checkpoint, "--inspect")
    assert done.code == 0, done.err
    assert "sequence 1 ·" in done.out and "⟦" in done.out and "\x1b" not in done.out
    assert not (tmp_path / "run").exists()


def test_a_shorter_length_than_the_context_is_kept(data):
    short = data(136, max_seq_len=112)
    assert short.max_seq_len == 112
    assert all(sum(len(tokens) for tokens, _ in s) <= 112 for s in short.sequences(0))
    assert data(136, max_seq_len=640).max_seq_len == data(136).max_seq_len == 136
