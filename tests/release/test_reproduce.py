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

DATA = REPO / "../shared/data"
RELEASE = REPO / "release/recipe"
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
    few_rows = {"csl_title_dev.json": 16, "fewclue_csldcp.jsonl.xz": 30}
    return few_rows.get(path.name, 600 if ".txt" in path.name else 300)


def packed(content: bytes, path: Path) -> bytes:
    return lzma.compress(content, preset=0) if path.suffix == ".xz" else content


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder like the one that the release was made from, with a few rows of each set."""
    place = tmp_path_factory.mktemp("raw")
    sources = ["csl/benchmark"]
    for mixture in ("text", "dialogues"):
        sets = yaml.safe_load((RELEASE / f"{mixture}.yaml").read_text("utf-8"))["sets"]
        sources += [one.get("raw", "none") for one in sets]
    for source in (DATA / name for name in sources):
        files = source.rglob("*") if source.is_dir() else [source]
        for path in (path for path in files if path.is_file()):
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
    assert code == -signal.SIGKILL and "release_base starts" in said, said

    code, said = reproduce(tree, raw)
    assert code == 0, said
    assert re.search(r"release_base continues at step \d+", said)
    assert said.count("nothing has changed, the clean rows are used again") >= 2
    assert "tokenizer.py train" not in said, "the vocabulary was made already"
    ends = list((tree / "out").glob(f"*/step-{limits['max_steps']:06d}"))
    assert {path.parent.name for path in ends} >= {"release_base", "release", "release_mean"}
    assert len(ends) == n_trainings + 2 >= 6
    one, pool = (
        json.loads((tree / f"out/release_scores/{name}.scores.json").read_text("utf-8"))
        for name in ("one", "all")
    )
    assert one["n"] == pool["n"] == 16
    assert {"greedy", "consensus"} <= one["decoding"].keys() and len(pool["models"]) == 3

    assert (tree / "release/README.md").read_bytes() == card
    assert (tree / "release/parity.json").read_bytes() != report
    released, last = load_model(tree / "release"), load_model(tree / "out/release_last")
    assert released.tokenizer.fingerprint == last.tokenizer.fingerprint
    assert released.model.n_parameters() == last.model.n_parameters()
    for name in ("second", "third"):
        assert load_model(tree / "release" / name).step == limits["max_steps"]
