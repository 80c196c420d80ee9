"""What the inspector shows: the same tokens as training reads, marked, aligned and harmless."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from babyllama.analysis.terminal_text import Painter, clipped, visible
from babyllama.config import REPO, parse, run
from babyllama.data import Mixture
from babyllama.prompts import SummaryPrompts
from babyllama.rows import write_rows
from babyllama.sources import DataConfig, SourceConfig, open_source
from babyllama.token_file import TokenFile, TokenFileWriter
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.tools.inspect_set import InspectConfig, as_read, main
from tokenizer import Tokenizer

PROMPTS = REPO / "configs/prompts/summary_zh.yaml"
TURNS = [
    ("user", "天气怎么样？"),
    ("assistant", "很好。\n去公园吧"),
    ("user", "谢谢"),
    ("assistant", "好"),
]
ROWS = {
    "text": [{"id": f"t/{n}", "text": f"第{n}天，小猫𠮷\n在窗台上。"} for n in range(12)],
    "chat": [
        {"id": f"c/{n}", "messages": [{"role": r, "content": f"{c}{n}"} for r, c in TURNS]}
        for n in range(12)
    ],
    "summary": [
        {"id": f"s/{n}", "text": f"{n}路公交今天开通，市民出行更加方便。", "summary": f"{n}路开通",
         "meta": {"keywords": [f"词{n}"]}}
        for n in range(12)
    ],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """data/clean, data/tokens and data/tokenizers with a small set of each kind."""
    model = tmp_path / "data/tokenizers/small.model"
    model.parent.mkdir(parents=True)
    model.write_bytes(tokenizer.bytes)
    for kind, rows in ROWS.items():
        path = tmp_path / f"data/clean/{kind}/train-00000.jsonl"
        write_rows(path, rows)
        target = tmp_path / f"data/tokens/small/{kind}/train-00000"
        pretokenize_shard(path, target, PretokenizeConfig(model, kind))
    return tmp_path / "data"


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process."""

    def call(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            run(main, parse(InspectConfig, "", list(map(str, words)), positional=("file",)))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return SimpleNamespace(code=end.value.code, out=out, err=err, errors=errors)

    return call


def plain(tokenizer: Tokenizer, width: int = 60) -> Painter:
    return Painter(tokenizer, False, width)


def read(path: Path, tokenizer: Tokenizer) -> list:
    """Every row of a file as (ids, mask)."""
    file, prompts = TokenFile(path), SummaryPrompts.load(PROMPTS, tokenizer)
    return [as_read(file, number, tokenizer, prompts) for number in range(file.n_docs)]


@pytest.mark.parametrize("kind", ["chat", "summary"])
def test_a_row_is_shown_as_the_training_run_reads_it(data: Path, tokenizer: Tokenizer, kind: str):
    config = SourceConfig(str(data / f"tokens/small/{kind}"))
    source = open_source(config, "train", tokenizer, DataConfig(prompts=PROMPTS), 512)
    mixture = Mixture([source], [1.0], seed=0)
    read_here = read(data / f"tokens/small/{kind}/train-00000", tokenizer)
    for position in range(12):
        _, _, number, _ = mixture.place(position)
        tokens, targets = mixture.row(position)
        ids, mask = read_here[number]
        assert ids[:-1] == tokens.tolist()
        learnt = np.where(np.array(mask[1:]) == 1, ids[1:], targets.min())
        assert learnt.tolist() == targets.tolist()


def test_signs_stand_round_what_is_learnt_and_nothing_else(data: Path, look: Callable):
    shown = look(data / "tokens/small/chat/train-00000", "--start", 3, "--n", 1).out
    assert re.findall("⟦([^⟧]*)⟧", shown) == ["很好。\n去公园吧3<eos>", "好3<eos>"]
    bare = shown.replace("⟦", "").replace("⟧", "")
    assert (
        "<bos>人类：天气怎么样？3\n\n助手：很好。\n去公园吧3<eos>\n\n人类：谢谢3\n\n助手：好3<eos>\n"
        in bare
    )
    assert "\x1b" not in shown


def test_colours_say_the_same_as_signs(data: Path, look: Callable, monkeypatch: pytest.MonkeyPatch):
    path = data / "tokens/small/chat/train-00000"
    signs = look(path).out
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = look(path).out
    marked = re.sub("\x1b\\[32m([^\x1b]*)\x1b\\[0m", "⟦\\1⟧", coloured)
    assert re.sub("\x1b\\[\\d*m", "", marked) == signs
    monkeypatch.setenv("NO_COLOR", "1")
    assert look(path).out == signs


def test_borders_cut_the_text_into_its_tokens(data: Path, tokenizer: Tokenizer):
    ids, mask = read(data / "tokens/small/text/train-00000", tokenizer)[0]
    shown = plain(tokenizer).dialogue((ids, mask), pieces=True)
    assert shown.startswith("⟦") and shown.endswith("|<eos>⟧")
    parts = shown[1:-1].split("|")
    assert len(parts) == len(ids) and "·" in parts  # 𠮷 is spelled in bytes
    assert "".join(parts).replace("·", "").replace("↵", "") == "第0天，小猫𠮷\n在窗台上。<eos>"


@given(width=st.integers(40, 90), text=st.text("天a气 \n😀b，", min_size=1, max_size=80))
def test_every_id_stands_above_its_token(tokenizer: Tokenizer, width: int, text: str):
    ids = tokenizer.encode(text, bos=True)
    lines = plain(tokenizer, width).ids(ids, pieces=True).split("\n")
    assert max(map(cell_len, lines)) <= width
    found, tokens = [], []
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        starts = [match.start() for match in re.finditer(r"\S+", above)]
        columns = [cell_len(below[: match.start()]) for match in re.finditer(r"\S+", below)]
        assert starts == columns
        found += map(int, above.split())
        tokens += below.split()
    assert found == ids
    whole = "".join(tokens).replace("·", "").replace("␣", " ").replace("↵", "\n")
    assert whole == "<bos>" + text


def test_few_ids_are_shown_and_the_others_counted(tokenizer: Tokenizer):
    ids = list(range(100, 300))
    line = plain(tokenizer, 80).ids(ids, pieces=False)
    shown, rest = line.split(" … ")
    assert len(line) <= 80 and shown.split() == list(map(str, ids[: len(shown.split())]))
    assert int(rest.split()[0]) == 200 - len(shown.split())
    assert plain(tokenizer, 80).ids(ids[:5], pieces=False) == "100 101 102 103 104"


@given(st.text(max_size=40), st.integers(2, 30))
def test_text_is_cut_by_its_width(text: str, width: int):
    cut = clipped(text, width)
    assert cell_len(cut) <= max(width, 1)
    assert cut == text or (cut[-1] == "…" and text.startswith(cut[:-1]))
    assert cell_len("天气a１é") == 4 + 1 + 2 + 1


@given(st.text())
def test_no_text_steers_the_terminal(text: str):
    shown = visible(text + "\x1b[2J\r\x9b\u202e\u200b\u2028")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e]", shown)
    assert visible("天\n气 👨‍👩‍👧") == "天\n气 👨‍👩‍👧"


def test_the_tokenizer_that_fits_is_found(data: Path, look: Callable, tokenizer: Tokenizer):
    other = data / "tokenizers/other.model"
    other.write_bytes(tokenizer.bytes + b"\x00")  # never opened: its fingerprint differs
    tokens = data / "tokens/small/chat/train-00000.idx"
    assert "learnt" in look(tokens).out
    (data / "tokenizers/small.model").unlink()
    (error,) = look(tokens).errors
    assert tokenizer.fingerprint[:12] in error and "'small'" in error and "other.model" in error


BAD = {
    "": "name a file",
    "{data}/nope": "no such file",
    "{data}/foreign.bin": "pre-tokenized again",
    "{data}/alone.bin": "alone.idx: no such file",
    "{data}/none/x/none.idx": "below its 0 rows",
    "{tokens} --tokenizer {data}/none.model": "no such file",
    "{tokens} --start 12": "below its 12 rows",
    "{tokens} --n 0": "--n of 1 or more",
}


@pytest.mark.parametrize("words, wanted", BAD.items(), ids=list(BAD))
def test_bad_input_is_one_clear_line(
    data: Path, look: Callable, tokenizer: Tokenizer, words: str, wanted: str
):
    for name in ("foreign.bin", "foreign.idx", "alone.bin"):
        (data / name).write_bytes(b"\x00\x01" * 300)
    with TokenFileWriter(data / "none/x/none", "text", tokenizer):
        pass
    found = look(*words.format(data=data, tokens=data / "tokens/small/chat/train-00000").split())
    assert found.code == 2 and len(found.errors) == 1 and "Traceback" not in found.err
    assert wanted in found.errors[0] and found.out == ""
