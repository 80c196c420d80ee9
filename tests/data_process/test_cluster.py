"""The Ray engine on a real cluster of two nodes, each in processes of its own."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from babyllama.config import REPO
from babyllama.errors import ConfigError
from data_process.executor import Job, run_shards

ray = pytest.importorskip("ray", reason="pip install -r requirements/cluster.txt")

RUN = """
import sys
from pathlib import Path
from data_process import raw
from data_process.pipeline import ProcessConfig, RawSet, make_clean
from data_process.registry import data_sets
from data_process.run import make_tokens
from tokenizer import Tokenizer
place, out, tokenizer = map(Path, sys.argv[1:4])
data_set = data_sets("text")[0]
raw.JOB_BYTES = 100_000
cfg = ProcessConfig(out=out, engine=sys.argv[4], workers=2)
make_clean([RawSet(data_set, place)], cfg)
make_tokens([data_set], Tokenizer(tokenizer), ProcessConfig("text", out=out, engine=sys.argv[4]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one processor each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twenty jobs' worth of made-up documents, one in ten repeated."""
    chance, lines = random.Random(0), []
    han = [chr(0x4E00 + n) for n in range(500)]
    for _ in range(4_000):
        text = "".join(chance.choices(han, k=170))
        lines += [json.dumps({"text": text}, ensure_ascii=False)] * (
            2 if len(lines) % 10 == 0 else 1
        )
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(raw: Path, out: Path, tokenizer: Path, engine: str, address: str) -> subprocess.Popen:
    """The run in a process of its own; what it says goes to <out>.log."""
    command = [sys.executable, "-c", RUN, raw, out, tokenizer, engine]
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(REPO)}
    with open(log_of(out), "wb") as log:
        return subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def bytes_of(out: Path) -> dict[str, bytes]:
    paths = [*(out / "clean").rglob("*"), *(out / "tokens").rglob("*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.is_file()}


def test_a_cluster_that_loses_workers_writes_the_same_bytes(cluster, raw, tokenizer, tmp_path):
    serial = start(raw, tmp_path / "serial", tokenizer.path, "serial", "")
    assert serial.wait() == 0, log_of(tmp_path / "serial").read_text()
    run = start(raw, tmp_path / "ray", tokenizer.path, "ray", cluster)
    killed, workers = 0, {}
    while run.poll() is None:
        for process in psutil.process_iter(["name", "cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_one"):
                workers[process.pid] = True
                if killed < 2:
                    process.kill()
                    killed += 1
        time.sleep(0.02)
    assert run.returncode == 0, log_of(tmp_path / "ray").read_text()
    assert killed == 2 and len(workers) > 2
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "serial")


def test_a_job_that_fails_on_the_cluster_ends_in_its_own_line(cluster, tmp_path):
    """An error inside a shard is the run's error, not a warning."""
    broken = tmp_path / "raw.jsonl"
    broken.write_bytes("这是一行文字，编码不对。\n".encode("utf-16") * 50)
    run = start(broken, tmp_path / "out", tmp_path / "none", "ray", cluster)
    assert run.wait() == 1
    last = log_of(tmp_path / "out").read_text().strip().split("\n")[-1]
    assert last.startswith("babyllama.errors.DataError: raw.jsonl: wanted")


def test_without_a_cluster_one_line_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    job = Job(tmp_path, tmp_path / "x", "key", None)
    with pytest.raises(ConfigError, match="ray start --head"):
        run_shards(print, [job], "ray", 1)
