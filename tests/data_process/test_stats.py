"""Statistics of data sets: figures that a slow count confirms, and pictures in both languages."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from babyllama.config import parse, run
from babyllama.log import FONTS, cjk_font
from babyllama.rows import read_rows, texts_of, write_rows
from data_process.pretokenize import PretokenizeConfig, pieces_of, pretokenize_shard
from data_process.tools.stats import (
    MANY_TURNS,
    StatsConfig,
    Words,
    as_text,
    draw,
    main,
    measure,
    panels_of,
    tables,
)
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
def data(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Clean rows and tokens of three sets, one of each kind, two parts and three files each."""
    for kind in KINDS:
        clean, n = tmp_path / "clean" / kind, 0
        for shard, n_rows in SHARDS.items():
            write_rows(clean / f"{shard}.jsonl", (row_of(kind, n + i) for i in range(n_rows)))
            n += n_rows
            target = tmp_path / "tokens" / tokenizer.path.stem / kind / shard
            pretokenize_shard(
                clean / f"{shard}.jsonl", target, PretokenizeConfig(tokenizer.path, kind)
            )
        dropped = {"duplicate": {"rows": 7, "examples": []}, kind: {"rows": 2, "examples": []}}
        (clean / "counts.json").write_text(json.dumps({"rows_out": 44, "dropped": dropped}))
    return tmp_path


@pytest.fixture
def measured(data: Path, tokenizer: Tokenizer) -> list:
    return [measure(str(data / "clean" / kind), tokenizer) for kind in KINDS]


@pytest.fixture
def stats(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process."""

    def call(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            run(main, parse(StatsConfig, "", list(map(str, words)), positional=("sets",)))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return SimpleNamespace(code=end.value.code, out=out, err=err, errors=errors)

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_a_slow_count(data: Path, tokenizer: Tokenizer, kind: str):
    found = measure(str(data / "clean" / kind), tokenizer)
    assert [part.split for part in found.parts] == ["train", "val"]
    for part in found.parts:
        paths = sorted((data / "clean" / kind).glob(f"{part.split}-*.jsonl"))
        rows = [row for path in paths for row in read_rows(path)]
        assert part.chars.tolist() == [sum(map(len, texts_of(row))) for row in rows]
        n_ids = [sum(len(tokenizer.encode(text)) for _, text in pieces_of(row)) for row in rows]
        assert (part.tokens - (kind == "text")).tolist() == n_ids
        assert part.chars_per_token == pytest.approx(sum(part.chars.tolist()) / sum(n_ids))
        assert part.sources == {name: sum(row["id"].startswith(name) for row in rows)
                                for name in ("web", "book")}  # fmt: skip
    ratios = [found.chars[n] / (found.tokens[n] - (kind == "text")) for n in range(44)]
    assert found.ratios.tolist() == pytest.approx(ratios)
    assert found.dropped == {"duplicate": 7, kind: 2}
    assert len(found.chars) == 44 and found.chars.dtype == found.tokens.dtype == np.int32


def test_without_a_tokenizer_everything_but_tokens_is_the_same(data: Path, measured: list):
    for kind, full in zip(KINDS, measured, strict=True):
        found = measure(str(data / "clean" / kind))
        assert found.tokens is None and found.turns == full.turns
        assert np.array_equal(found.chars, full.chars) and found.dropped == full.dropped


def test_the_tables_add_up(measured: list):
    found = tables(measured)
    lengths = found["lengths"]
    assert lengths["", "rows"].tolist() == [39, 5] * 3
    for one in measured:
        lines = lengths.loc[one.name]
        assert lines["characters", "all"].sum() == one.chars.sum()
        assert lines["tokens", "all"].sum() == one.tokens.sum()
        train = one.parts[0].chars
        assert lines.loc["train", ("characters", "median")] == round(np.median(train))
        assert lines.loc["train", ("characters", "most")] == train.max()
    assert found["rows by source"].sum().to_dict() == {"train": 39 * 3, "val": 5 * 3}
    assert found["dropped rows"].loc["duplicate"].tolist() == [7, 7, 7]
    turns = found["dialogues by number of turns"]["chat"]
    assert turns.index.tolist() == [*map(str, range(1, MANY_TURNS)), f"{MANY_TURNS}+"]
    assert turns.sum() == 44 and turns["1"] == 3 and turns["12+"] == 2 * 4 + 3


def test_a_set_of_one_source_without_dialogues_needs_no_more_tables(data: Path):
    write_rows(data / "clean/one/train-00000.jsonl", [{"id": "one/0", "text": "字"}])
    one = measure(str(data / "clean/one"))
    assert list(tables([one])) == ["lengths"] and one.dropped is None
    draw([one], data / "one.png", None, None)
    assert (data / "one.png").stat().st_size > 10_000


def test_turns_of_several_sets_stay_in_order(data: Path):
    for name, turns in (("few", (10, 2)), ("many", (30, 9, 1))):
        pair = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
        rows = [{"id": f"{name}/{n}", "messages": pair * n} for n in turns]
        write_rows(data / f"clean/{name}/train-00000.jsonl", rows)
    sets = [measure(str(data / "clean" / name)) for name in ("few", "many")]
    table = tables(sets)["dialogues by number of turns"]
    assert table.index.tolist() == ["1", "2", "9", "10", "12+"]
    assert re.search(r"^2 +1 +$", as_text(table), re.M)  # a gap is blank, a count has no point


def axes_of(panel: int, sets: list) -> object:
    axes = Figure().subplots()
    panels_of(sets)[panel](axes, sets, Words(None))
    return axes


def test_every_curve_of_lengths_covers_the_same_area(measured: list):
    curves = [patch.get_data() for patch in axes_of(0, measured).patches]
    areas = [np.sum(c.values * np.diff(np.log(c.edges))) for c in curves]
    assert len(areas) == 2 * 3 and areas == pytest.approx([areas[0]] * 6)
    shares = [c.get_data().values.sum() for c in axes_of(2, measured).patches]
    assert all(98 < share <= 100.001 for share in shares)  # the outermost rows are left out


def test_the_bars_are_as_long_as_their_counts(measured: list):
    for panel, total in ((3, 44 * 3), (4, 3 * (7 + 2))):
        bars, ends = axes_of(panel, measured).patches, {}
        for bar in bars:
            ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
        # Pieces of a bar follow one another: its end is the sum of their widths.
        assert sum(bar.get_width() for bar in bars) == sum(ends.values()) == total
    heights = [bar.get_height() for bar in axes_of(5, measured).patches]
    assert sum(heights) == pytest.approx(100)


def test_what_finds_no_room_among_the_bars_is_summed_up(measured: list):
    measured[0].dropped = {f"reason_{n}": n for n in range(1, 41)}
    axes = axes_of(4, measured[:1])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "reason_40" and names[-1] == "29 others" and len(names) == 12
    assert sum(bar.get_width() for bar in axes.patches) == sum(range(41))


@pytest.mark.parametrize("language, n_sets", [("zh", 3), ("en", 11)])
def test_the_picture_is_drawn_in_both_languages(
    tmp_path: Path, measured: list, language: str, n_sets: int
):
    """A character that the font lacks would be a warning, and warnings are errors."""
    font = cjk_font() if language == "zh" else None
    if language == "zh" and font is None:
        pytest.skip("no Chinese font is installed")
    measured[0].name = "新闻"
    draw((measured * 4)[:n_sets], tmp_path / "x.png", font, "small")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1500
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    quarters = [pixels[: height // 2, : width // 2], pixels[height // 2 :, width // 2 :]]
    assert all((quarter < 200).mean() > 0.005 for quarter in quarters)
    assert [path.name for path in tmp_path.glob("*.png")] == ["x.png"]


def test_only_a_font_that_has_the_characters_is_found(monkeypatch: pytest.MonkeyPatch):
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


def test_the_command_prints_the_tables_and_names_the_picture(
    data: Path, stats: Callable, tokenizer: Tokenizer
):
    sets, picture = [data / "clean" / kind for kind in KINDS], data / "new/stats.png"
    found = stats(*sets, "--tokenizer", tokenizer.path, "--picture", picture)
    assert found.code == 0 and found.out.endswith(f"picture: {picture}\n") and picture.is_file()
    assert re.findall(r"^(?:lengths|dropped rows|dialogues by.*)$", found.out, re.M) == [
        "lengths", "dropped rows", "dialogues by number of turns"]  # fmt: skip
    (data / "clean/text/counts.json").unlink()
    found = stats(sets[0], sets[0], "--picture", picture)
    assert "text: there is no counts.json" in found.out and found.out.count("train") == 2


def stale(data: Path) -> None:
    write_rows(data / "clean/chat/val-00000.jsonl", [row_of("chat", 1)])


def other_tokenizer(data: Path) -> None:
    (data / "small.model").write_bytes((data / "small.model").read_bytes() + b"\x82\x7d\x01x")


BAD = {
    "": (None, "no set to measure"),
    "{data}/clean/nope": (None, "sets that are there: chat, summary, text; make one"),
    "a-set-that-nobody-has": (None, "data/clean/a-set-that-nobody-has: wanted clean rows"),
    "{chat} --tokenizer {data}/none.model": (None, "no such file"),
    "{chat} --tokenizer {data}/odd.model": (None, "tokens/odd/chat/train-00000.idx: no such file"),
    "{chat} --tokenizer {data}/small.model": (other_tokenizer, "pre-tokenize again"),
    "{chat} --tokenizer {tokenizer}": (stale, "found 5; the rows have changed"),
    "{chat} --labels fr": (None, "--help"),
    "{chat}": (lambda data: (data / "clean/chat/val-00000.jsonl").write_text(""), "empty file"),
    "{text}": (lambda data: (data / "clean/text/counts.json").write_text('{"dropped": 3}'),
               "wanted the counts of a set"),
}  # fmt: skip


@pytest.mark.parametrize("words, spoil_wanted", BAD.items(), ids=list(BAD))
def test_bad_input_is_one_clear_line(
    data: Path, stats: Callable, tokenizer: Tokenizer, words: str, spoil_wanted: tuple
):
    spoil, wanted = spoil_wanted
    for name in ("small", "odd"):
        (data / f"{name}.model").write_bytes(tokenizer.bytes)
    if spoil:
        spoil(data)
    places = {kind: data / "clean" / kind for kind in KINDS}
    line = words.format(data=data, tokenizer=tokenizer.path, **places).split()
    found = stats(*line, "--picture", data / "x.png")
    assert found.code == 2 and len(found.errors) == 1 and wanted in found.errors[0], found
    assert not (data / "x.png").exists()
