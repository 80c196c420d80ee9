"""Statistics of data sets: figures that a slow count and the token files confirm."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from babyllama.config import parse, run
from babyllama.rows import read_rows, texts_of, write_rows
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.tools.stats import StatsConfig, main, measured, tables
from tokenizer import Tokenizer

TEXT = "今天天气很好，我们去公园散步。公园里有很多花，也有很多人。"
KINDS = ("text", "chat", "summary")
SHARDS = {"train-00000": 30, "train-00001": 9, "val-00000": 5}


def row_of(kind: str, n: int) -> dict:
    """A row whose length, turns and source depend on its number."""
    source, text = ("web" if n % 3 else "book"), TEXT[: 1 + n % 25] * (1 + n % 4)
    if kind == "chat":
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": TEXT}]
        first = [{"role": "system", "content": "资料"}] * (n % 2)
        return {"id": f"{source}/{n}", "messages": first + turns * (1 + n % 15)}
    fields = {"text": text, "summary": text[:4]} if kind == "summary" else {"text": text}
    return {"id": f"{source}/{n}", **fields}


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Clean rows of three sets, one of each kind, two parts and three files each."""
    for kind in KINDS:
        clean, n = tmp_path / "clean" / kind, 0
        for shard, n_rows in SHARDS.items():
            write_rows(clean / f"{shard}.jsonl", (row_of(kind, n + i) for i in range(n_rows)))
            n += n_rows
        dropped = {"duplicate": {"rows": 7}, kind: {"rows": 2}}
        (clean / "counts.json").write_text(json.dumps({"rows_out": 44, "dropped": dropped}))
    return [tmp_path / "clean" / kind for kind in KINDS]


@pytest.fixture
def stats(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process."""

    def call(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            run(main, parse(StatsConfig, "", list(map(str, words)), positional=("sets",)))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return SimpleNamespace(code=end.value.code, out=out, errors=errors)

    return call


def test_lengths_are_those_of_the_rows_and_of_their_token_files(
    places: list[Path], tokenizer: Tokenizer, tmp_path: Path
):
    for place in places:
        found = list(measured(place, tokenizer))
        rows = [row for path in sorted(place.glob("*.jsonl")) for row in read_rows(path)]
        assert [one["characters"] for one in found] == [sum(map(len, texts_of(r))) for r in rows]
        assert [one["part"] for one in found] == ["train"] * 39 + ["val"] * 5
        cfg, n_tokens = PretokenizeConfig(tokenizer.path, place.name), 0
        for path in place.glob("*.jsonl"):
            n_tokens += pretokenize_shard(path, tmp_path / path.stem, cfg)["tokens"]
        assert sum(one["tokens"] for one in found) == n_tokens


def test_the_tables_add_up(places: list[Path], tokenizer: Tokenizer):
    found = tables(places, tokenizer)
    chars = found["characters"]
    assert chars["count"].tolist() == [39, 5] * 3
    train = [one["characters"] for one in measured(places[0], None) if one["part"] == "train"]
    line = chars.loc[("text", "train")]
    assert (line["max"], line["sum"]) == (max(train), sum(train))
    assert line["50%"] == np.median(train)
    assert found["turns"].loc[("chat", "train"), "max"] == 15
    assert found["rows by source"]["rows"].sum() == 44 * 3
    assert found["dropped rows"].loc["duplicate"].tolist() == [7, 7, 7]


def test_a_set_of_one_source_without_dialogues_needs_no_more_tables(places: list[Path]):
    one = places[0].with_name("one")
    write_rows(one / "train-00000.jsonl", [{"id": "one/0", "text": "字"}])
    assert list(tables([one], None)) == ["characters"]


def test_the_command_prints_the_tables(places: list[Path], stats: Callable, tokenizer: Tokenizer):
    found = stats(*places, "--tokenizer", tokenizer.path)
    titles = [line for line in found.out.splitlines() if line and line[0] != " " and line in TITLES]
    assert found.code == 0 and titles == list(TITLES), found


TITLES = ("characters", "tokens", "turns", "rows by source", "dropped rows")
BAD = {
    "": "no set to measure",
    "{place}/nope": "sets that are there: chat, summary, text; make one",
    "a-set-that-nobody-has": "data/clean/a-set-that-nobody-has: wanted clean rows",
    "{place}/chat --tokenizer {place}/none.model": "no such file",
    "{place}/text": "wanted the counts of a finished set",
}


@pytest.mark.parametrize("words, wanted", BAD.items(), ids=list(BAD))
def test_bad_input_is_one_clear_line(places: list[Path], stats: Callable, words: str, wanted: str):
    (places[0] / "counts.json").write_text("3")
    found = stats(*words.format(place=places[0].parent).split())
    assert found.code == 2 and len(found.errors) == 1 and wanted in found.errors[0], found
