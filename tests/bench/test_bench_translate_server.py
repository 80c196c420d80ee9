"""bench.translate asks our own server: weak models are refused by the checks, kills lose nothing.

The server is a real process. Its model has weights made by hand, so that what it says is known.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from babyllama.config import REPO
from babyllama.errors import DataError
from bench.tasks import load, rows_of
from bench.translate import TranslateConfig, main
from conftest import small_config
from model import Transformer
from serving import Running, endless_model, save, serving
from tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bench"
SAID = "你好"
N_ROWS = 300


def parrot(tokenizer: Tokenizer) -> Transformer:
    """A model that answers everything with SAID: its layers add nothing, so that the next token
    depends on the newest one alone."""
    model = Transformer(small_config(tokenizer.vocab_size, max_seq_len=512)).eval()
    chain = [*tokenizer.encode(SAID), tokenizer.eos_id]
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
        model.tok_embeddings.weight.zero_()
        model.tok_embeddings.weight[:, 0] = 1
        model.output.weight.zero_()
        for place, token in enumerate(chain):
            model.output.weight[token, place] = 9
            model.tok_embeddings.weight[token] = 0
            model.tok_embeddings.weight[token, place + 1] = 1
    return model


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("parrot")
    with serving(save(parrot(tokenizer), tokenizer, place / "parrot"), place / "log") as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Open questions; every tenth holds a number, one is longer than the model's context."""
    place = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"who wrote the {word(n)} book" + " of 1984" * (n % 10 == 0), "answer": ["A"]}
        for n in range(N_ROWS)
    ]
    rows[5]["question"] = "who wrote it and why " * 100
    file = place / "natural_questions" / "NQ-open.dev.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return place


def word(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:03}")


def config(server: Running, task: str, data: Path, out: Path, **more: object) -> TranslateConfig:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    where = {"endpoint": f"{server.url}/v1", "model": model["id"]}
    return TranslateConfig(task, data, out, **where, **more)


def kept(out: Path) -> list[dict]:
    """The answers in the store, as far as its lines are whole."""
    path = out / "natural_questions" / "translated.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line)[1] for line in whole.split(b"\n") if line]


def n_replies(server: Running) -> float:
    """Replies that the server wrote to their end, once it has nothing left to write."""
    limit = time.monotonic() + 30
    while server.metric("babyllama_open_replies"):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return server.metric('babyllama_replies_total{end="eos"}')


def test_rows_whose_checks_fail_are_left_out_and_a_kill_loses_nothing(server, data, tmp_path):
    cfg = config(server, "naturalquestions", data, tmp_path, workers=2, tries=2)
    command = [
        sys.executable, "-m", "bench.translate", cfg.task, "--data", data, "--out", tmp_path,
        "--endpoint", cfg.endpoint, "--model", cfg.model, "--workers", "2", "--tries", "2",
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), cwd=REPO, stderr=subprocess.DEVNULL) as process:
        while sum("zh" in answer for answer in kept(tmp_path)) < 10:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before, n_kept = n_replies(server), sum("zh" in answer for answer in kept(tmp_path))
    assert 10 <= n_kept < N_ROWS // 2, "it was killed on its way"

    main(cfg)
    n_numbers, n_long = N_ROWS // 10, 1
    n_good = N_ROWS - n_numbers - n_long + 1  # and the answer "A", which is one text
    assert n_replies(server) - before == n_good - n_kept + 2 * n_numbers, "none twice"
    lines = (tmp_path / "natural_questions/failed.jsonl").read_text("utf-8").splitlines()
    failed = [json.loads(line)["texts"][0] for line in lines]
    assert len(failed) == n_numbers + n_long
    assert all("1984" in text or len(text) > 1000 for text in failed)
    reasons = [answer["lost"] for answer in kept(tmp_path) if "lost" in answer]
    assert {"缺少数字 1984", "原文太长，模型的上下文放不下"} == set(reasons)
    rows = rows_of(load("naturalquestions"), tmp_path, None).every
    assert len(rows) == N_ROWS - len(failed) and all(row["ask"] == SAID for row in rows)


def test_of_a_model_that_cannot_translate_nothing_passes(tokenizer, tmp_path, capsys):
    """Random weights: every text is refused, with the reason."""
    model = endless_model(tokenizer, context=512)
    log = tmp_path / "log"
    with serving(save(model, tokenizer, tmp_path / "weak"), log) as server:
        cfg = config(server, "gsm8k", FIXTURES, tmp_path / "zh", tries=1)
        with pytest.raises(DataError, match="translated no entry"):
            main(cfg)
    listed = (tmp_path / "zh/gsm8k/failed.jsonl").read_text("utf-8").splitlines()
    n_entries = sum(
        len((FIXTURES / f"gsm8k/{name}.jsonl").read_text("utf-8").splitlines())
        for name in ("test", "train")
    )
    assert len(listed) == n_entries and "left out: test.jsonl: " in capsys.readouterr().out
