"""Perplexity, bits per byte and accuracy: what they are, and what they do not depend on."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama.analysis.perplexity import (
    Document,
    document_sums,
    forgotten,
    open_held_out,
    windows,
)
from babyllama.checkpoint import Snapshot, load_model, save_checkpoint
from babyllama.config import REPO
from babyllama.distributed import World
from babyllama.errors import DataError
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.rows import write_rows
from conftest import TEXTS, save_model, small_config
from model import IGNORED, Transformer
from tokenizer import Tokenizer

SCRIPT = "babyllama/analysis/perplexity.py"
PROMPTS = REPO / "tests/small_prompts.yaml"
ALONE = World(0, 1, torch.device("cpu"))
ROWS = {
    "text": [{"id": f"text/{n}", "text": text * (1 + 3 * n)} for n, text in enumerate(TEXTS)],
    "chat": [
        {
            "id": f"chat/{n}",
            "messages": [
                {"role": "user", "content": text[:9]},
                {"role": "assistant", "content": text[9:20]},
                {"role": "user", "content": "然后呢？"},
                {"role": "assistant", "content": text},
            ],
        }
        for n, text in enumerate(TEXTS)
    ],
    "summary": [
        {"id": f"summary/{n}", "text": text * (1 + 2 * n), "summary": text[:8]}
        for n, text in enumerate(TEXTS)
    ],
}


@pytest.fixture
def rows_root(tmp_path: Path) -> Path:
    """Three sets of rows, one a kind, in folders as data_process leaves them."""
    for kind, rows in ROWS.items():
        write_rows(tmp_path / "rows" / kind / "val-00000.jsonl", rows)
    return tmp_path / "rows"


def evaluated(script, checkpoint: Path, data: object, *flags: object) -> dict:
    out = checkpoint.parent / "figures.json"
    flags = ("--device", "cpu", "--prompts", PROMPTS, *flags)
    done = script(SCRIPT, checkpoint, "--data", data, "--out", out, *flags)
    assert done.code == 0, done.err
    return json.loads(out.read_text("utf-8"))


def sets_of(found: dict) -> dict:
    (measured,) = found["checkpoints"].values()
    return {Path(name).name: row for name, row in measured["sets"].items()}


def all_sets(root: Path) -> str:
    return ",".join(str(root / kind) for kind in ROWS)


def slow_sums(model: Transformer, document: Document, stride: int) -> list[float]:
    """Each target by itself: as many tokens before it as its window holds."""
    length, ids = model.config.max_seq_len, torch.from_numpy(document.ids)
    loss = hits = n = 0
    for place in range(1, len(ids)):
        if not document.is_target[place]:
            continue
        window_end = length
        while window_end < place:
            window_end = min(len(ids) - 1, window_end + stride)
        seen = ids[max(0, window_end - length) : place]
        with torch.no_grad():
            logits = model(seen[None])[0, -1].double()
        loss -= float(logits.log_softmax(-1)[ids[place]])
        hits += int(logits.argmax() == ids[place])
        n += 1
    return [loss, n, hits]


def documents_of(root: Path, kind: str, tokenizer: Tokenizer) -> list[Document]:
    return open_held_out(str(root / kind), "val", None, tokenizer, PROMPTS, 128).documents


@pytest.mark.parametrize("kind", ROWS)
def test_sums_are_those_of_one_target_at_a_time(rows_root, model, tokenizer, kind):
    documents = documents_of(rows_root, kind, tokenizer)[:3]
    documents[0] = documents_of(rows_root, "text", tokenizer)[-1]  # longer than the context
    assert len(documents[0].ids) > 2 * 128
    found = document_sums(model, documents, 48, 2, ALONE)
    wanted = np.array([slow_sums(model, document, 48) for document in documents])
    assert np.allclose(found, wanted, rtol=2e-6, atol=1e-4) and wanted[:, 1].min() > 3


def test_figures_do_not_depend_on_batch_size(checkpoint, rows_root, script):
    first, *others = [
        sets_of(evaluated(script, checkpoint, all_sets(rows_root), "--batch_size", n))
        for n in (1, 3, 64)
    ]
    assert list(first) == list(ROWS)
    for other in others:
        for kind, row in first.items():
            for key in ("ppl", "bpb", "accuracy", "n_targets", "n_bytes"):
                assert other[kind][key] == pytest.approx(row[key], rel=1e-6), (kind, key)


def test_bytes_are_those_of_what_is_predicted(checkpoint, rows_root, script):
    found = sets_of(evaluated(script, checkpoint, all_sets(rows_root)))
    assert found["text"]["n_bytes"] == sum(len(row["text"].encode()) for row in ROWS["text"])
    assert found["summary"]["n_bytes"] == sum(len(r["summary"].encode()) for r in ROWS["summary"])
    answers = [m for row in ROWS["chat"] for m in row["messages"] if m["role"] == "assistant"]
    assert found["chat"]["n_bytes"] == sum(len(m["content"].encode()) for m in answers)
    assert found["summary"]["counts"]["text_cut"] > 0


def test_a_model_that_knows_nothing_pays_log2_of_the_vocabulary(tmp_path, tokenizer, rows_root,
                                                               script):  # fmt: skip
    model = Transformer(small_config(tokenizer.vocab_size))
    with torch.no_grad():
        model.output.weight.zero_()
    flat = save_model(tmp_path / "flat", model, tokenizer)
    row = sets_of(evaluated(script, flat, rows_root / "text"))["text"]
    n_targets = sum(len(tokenizer.encode(row["text"])) + 1 for row in ROWS["text"])
    assert row["n_targets"] == n_targets
    assert row["ppl"] == pytest.approx(tokenizer.vocab_size, rel=1e-6)
    wanted = math.log2(tokenizer.vocab_size) * n_targets / row["n_bytes"]
    assert row["bpb"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("n, length, stride", [(10, 4, 2), (5, 4, 4), (4, 4, 1), (23, 8, 3)])
def test_windows_predict_each_target_once_and_with_context(n, length, stride):
    document = Document(np.arange(n), np.arange(n) > 0, "")
    seen = []
    for tokens, targets in windows(document, length, stride):
        assert len(tokens) == len(targets) <= length
        for place in np.flatnonzero(targets != IGNORED):
            assert tokens[place] == targets[place] - 1
            assert place >= min(tokens[place], length - stride)
            seen.append(int(targets[place]))
    assert seen == list(range(1, n))


def test_windows_without_a_target_are_not_computed():
    is_target = np.zeros(40, bool)
    is_target[38] = True
    assert len(list(windows(Document(np.arange(40), is_target, ""), 8, 4))) == 1


def test_the_fixed_set_is_named_by_its_texts(checkpoint, rows_root, script):
    few = evaluated(script, checkpoint, rows_root / "chat", "--max_rows", 2)
    every = evaluated(script, checkpoint, rows_root / "chat")
    (few,), (every,) = few["sets"].values(), every["sets"].values()
    assert few["sha256"] != every["sha256"] and len(few["sha256"]) == 64
    assert (few["n_documents"], every["n_documents"]) == (2, len(TEXTS))


def test_a_summary_that_cannot_fit_is_counted(tmp_path, script, checkpoint):
    rows = [{"id": f"a/{n}", "text": "长文" * 40, "summary": "题" * n} for n in (200, 3)]
    write_rows(tmp_path / "a.jsonl", rows)
    found = sets_of(evaluated(script, checkpoint, tmp_path / "a.jsonl"))["a.jsonl"]
    assert found["counts"] == {"text_cut": 1, "summary_does_not_fit": 1}


def test_checkpoints_stand_in_one_table(checkpoint, tmp_path, tokenizer, rows_root, script):
    torch.manual_seed(1)
    model = Transformer(small_config(tokenizer.vocab_size))
    other = save_model(tmp_path / "other", model, tokenizer, "pretrain", 3)
    done = script(SCRIPT, checkpoint, other.parent, "--data", rows_root / "chat")
    assert done.code == 0, done.err
    found = json.loads((checkpoint.parent / "evaluate.json").read_text("utf-8"))
    assert list(found["checkpoints"]) == [str(checkpoint), str(other)]
    for path, measured in found["checkpoints"].items():
        (row,) = measured["sets"].values()
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"{path}  ")]
        assert f"{row['bpb']:.4f}" in line and f"{row['ppl']:.2f}" in line


def save(run: Path, step: int, tokenizer: Tokenizer, parent: Path | None = None) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(step)
    model = Transformer(small_config(tokenizer.vocab_size))
    optimizer = make_optimizer(model, OptimConfig())
    made = Snapshot(
        run, model, tokenizer, "sft", parent and str(parent), optimizer, {"tokens": 0}, keep=9
    )
    return save_checkpoint(made, step)


def test_all_steps_of_a_run_follow_the_checkpoint_that_it_began_with(
    tmp_path, tokenizer, rows_root, script
):
    base = save(tmp_path / "base", 3, tokenizer)
    steps = [base, *(save(tmp_path / "run", n, tokenizer, parent=base) for n in (5, 10))]
    config = f"data:\n  sources:\n  - {{name: {rows_root / 'chat'}, weight: 2.0}}\n"
    (tmp_path / "run/config.yaml").write_text(config, "utf-8")
    done = script(SCRIPT, tmp_path / "run", "--steps", "true", "--device", "cpu")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run/evaluate.json").read_text("utf-8"))
    assert list(found["checkpoints"]) == list(map(str, steps))
    assert list(found["sets"]) == [str(rows_root / "chat")]
    first, second, last = (
        step["sets"][str(rows_root / "chat")]["bpb"] for step in found["checkpoints"].values()
    )
    assert f"  {second - first:+.4f}  " in done.out and f"  {last - first:+.4f}  " in done.out
    assert f"forgotten: {last - min(first, second):+.4f} bits per byte" in done.out


def test_forgotten_is_since_the_best_before_the_last():
    assert forgotten(np.array([[3.0, 6], [2, 5], [2.75, 3]])).tolist() == [0.75, -2]


def test_checkpoints_of_other_tokenizers_are_compared_by_bytes(
    tmp_path, tokenizer, script, monkeypatch
):
    path = tmp_path / "other.model"
    path.write_bytes(tokenizer.bytes + b"\x22\x00")  # an empty field more
    other = Tokenizer(path)
    assert other.fingerprint != tokenizer.fingerprint
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data/clean/chat/val-00000.jsonl", ROWS["chat"])
    runs = [save(tmp_path / "run", 5, tokenizer), save(tmp_path / "later", 1, other)]
    done = script(SCRIPT, *runs, "--data", "chat", "--device", "cpu")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run/evaluate.json").read_text("utf-8"))
    first, last = (step["sets"]["chat"]["bpb"] for step in found["checkpoints"].values())
    assert f"{last - first:+.4f}" in done.out


def test_the_shares_of_two_processes_make_up_the_whole(rows_root, model, tokenizer):
    class Share(World):
        def sum(self, values):
            return values  # what this process found, before the others' is added

    documents = documents_of(rows_root, "chat", tokenizer)
    cpu = torch.device("cpu")
    parts = [document_sums(model, documents, 64, 1, Share(r, 2, cpu)) for r in (0, 1)]
    whole = document_sums(model, documents, 64, 1, ALONE)
    assert np.allclose(sum(parts), whole, rtol=1e-12) and all(part.any() for part in parts)


def test_mistakes_are_one_line(checkpoint, tmp_path, script):
    def mistake(*argv: object) -> str:
        return script(SCRIPT, *argv).error

    assert "wanted a checkpoint" in mistake()
    assert "no_such_set" in mistake(checkpoint, "--data", "no_such_set")
    assert "wanted sets to measure, found none" in mistake(checkpoint)
    assert "wanted sets to measure, found none" in mistake(checkpoint, "--data", " , ")
    assert "no such checkpoint" in mistake(tmp_path / "none")
    assert "--batch_size wants 1" in mistake(checkpoint, "--batch_size", 0)
    asked = {"role": "user", "content": "？"}, {"role": "assistant", "content": "。"}
    row = {"id": "v/1", "image": "a.jpg", "messages": asked}
    write_rows(tmp_path / "seen.jsonl", [row])
    assert "found vqa in 'v/1'" in mistake(checkpoint, "--data", tmp_path / "seen.jsonl")


def test_a_set_without_a_fitting_row_is_refused(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [{"id": "a/1", "text": "长文" * 40, "summary": "题" * 200}])
    with pytest.raises(DataError, match="summary_does_not_fit"):
        open_held_out(str(tmp_path / "a.jsonl"), "val", None, tokenizer, PROMPTS, 128)


def test_load_model_and_the_script_agree_on_the_checkpoint(checkpoint, rows_root, script):
    found = evaluated(script, checkpoint, rows_root / "chat")
    (about,) = found["checkpoints"].values()
    loaded = load_model(checkpoint)
    assert about["tokenizer"] == loaded.tokenizer.fingerprint and about["step"] == 7
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert about["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
