"""reproduce.sh from its first line to its last, on a few rows of each set, with a kill between."""

import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from babyllama.checkpoint import load_model
from babyllama.config import REPO
from babyllama.log import read_metrics

DATA = REPO / "../shared/data"
RELEASE = REPO / "release/recipe"
FOLDERS = (
    "csl", "science_abstracts", "news_zh", "prose", "reading", "dialogue", "wikipedia_zh", "d2l_zh",
    "oi_wiki", "clue_corpus_small", "luxun", "sft",
)  # fmt: skip
REHEARSAL = yaml.safe_load((RELEASE / "rehearsal.yaml").read_text("utf-8"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sys.platform == "win32", reason="a shell script"),
    pytest.mark.skipif(not DATA.is_dir(), reason="wants the raw data"),
]


def few(path: Path, n: int) -> bytes:
    """The first rows of a raw file: of its lists, where it is JSON, else its lines."""
    content = path.read_bytes()
    text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        return "\n".join(text.split("\n")[:n]).encode()
    if isinstance(content, dict):
        content = {name: rows[:n] for name, rows in content.items()}
    else:
        content = content[:n]
    return json.dumps(content, ensure_ascii=False).encode()


def n_rows(path: Path) -> int:
    """Enough for a validation part of each set (lines are short, many are dropped)."""
    if path.name == "csl_title_dev.json":
        return 16
    return 600 if path.suffix == ".tsv" or ".txt" in path.name else 300


def packed(content: bytes, path: Path) -> bytes:
    return lzma.compress(content, preset=0) if path.suffix == ".xz" else content


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder like the one that the release was made from, with a few rows of each set."""
    place = tmp_path_factory.mktemp("raw")
    for path in (path for name in FOLDERS for path in (DATA / name).rglob("*") if path.is_file()):
        target = place / path.relative_to(DATA)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(packed(few(path, n_rows(path)), path))
    return place


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository without what git ignores."""
    place = tmp_path_factory.mktemp("tree")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=REPO, text=True).split("\0")
    for name in filter(lambda name: (REPO / name).is_file(), names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, place / name)
    return place


def reproduce(tree: Path, raw: Path, kill_at: str = "") -> tuple[int, str]:
    """Exit code and output of the script, which is killed with all it started at a line."""
    python = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    lines = []
    with subprocess.Popen(
        ["release/recipe/reproduce.sh", str(raw), "", "release/recipe/rehearsal.yaml"],
        cwd=tree, env=os.environ | {"PATH": python}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            if kill_at and kill_at in line:
                os.killpg(process.pid, signal.SIGKILL)
                kill_at = ""
    return process.returncode, "".join(lines)


def test_the_chain_runs_to_its_end_and_goes_on_where_it_was_killed(tree, raw):
    card, report = ((tree / "release" / n).read_bytes() for n in ("README.md", "parity.json"))
    chain = (tree / "release/recipe/reproduce.sh").read_text("utf-8")
    n_trainings = len(re.findall(r"^train \w+\.py", chain, re.MULTILINE))
    limits = REHEARSAL["train"]
    code, said = reproduce(tree, raw, kill_at=f"val step {limits['eval_every']}/")
    assert code == -signal.SIGKILL and "flagship_base starts" in said, said

    code, said = reproduce(tree, raw)
    assert code == 0, said
    assert re.search(r"flagship_base continues at step \d+", said)
    assert said.count("nothing has changed, the clean rows are used again") >= 2
    assert "release.recipe.sets" not in said  # made already
    ends = list((tree / "out").glob(f"*/step-{limits['max_steps']:06d}"))
    runs = {"flagship_base", "flagship_decay", "flagship", "flagship_mean"}
    assert {path.parent.name for path in ends} == runs and len(ends) == n_trainings + 1
    rates = [row["lr"] for row in read_metrics(tree / "out/flagship_decay") if "lr" in row]
    assert rates == sorted(rates, reverse=True) and rates[0] == 5e-3 > 6 * rates[-1]
    for name in ("computing", "papers", "cnki"):
        path = tree / f"out/flagship_scores/{name}.scores.json"
        assert {"greedy", "beam"} <= json.loads(path.read_text("utf-8"))["decoding"].keys()
    assert len((tree / "out/flagship_scores/openings.jsonl").read_text("utf-8").splitlines()) == 80

    assert (tree / "release/README.md").read_bytes() == card
    assert (tree / "release/recipe/reproduce.sh").is_file()
    assert (tree / "release/parity.json").read_bytes() != report
    released, half, last = (
        load_model(tree / name) for name in ("release", "out/flagship_float16", "out/flagship_mean")
    )
    assert released.tokenizer.fingerprint == last.tokenizer.fingerprint
    assert released.model.n_parameters() == half.model.n_parameters() == last.model.n_parameters()
