"""Preference tuning: the loss by hand, pairs as token files, a run that is exact when resumed."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from babyllama.data import DataConfig, open_data
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, write_rows
from babyllama.run_dir import list_checkpoints
from babyllama.sources import READERS as OTHERS
from babyllama.sources import SourceConfig, open_source
from babyllama.trainer import TrainConfig, forward_backward
from babyllama.tuning.preference import (
    READERS,
    Pairs,
    answer_log_probs,
    dpo,
    write_tokens,
)
from conftest import TEXTS, small_config, write_run
from model import Transformer

WORLD = World(0, 1, torch.device("cpu"))
LOOP = "今天天气很好，我们去公园。"


def rows(n: int = 24) -> list[dict]:
    """Rows of one turn and of two, some with reference text."""
    found = []
    for i in range(n):
        messages = [{"role": "user", "content": TEXTS[i % 6][:9]}]
        if i % 3 == 0:
            earlier = [messages[0], {"role": "assistant", "content": TEXTS[i % 5][:4]}]
            messages = [*earlier, {"role": "user", "content": "还有呢？"}]
        if i % 4 == 0:
            messages = [{"role": "system", "content": TEXTS[3][:8]}, *messages]
        answers = {"chosen": TEXTS[i % 6][: 4 + i % 5], "rejected": LOOP[: 3 + i % 7]}
        found.append({"id": f"mine/{i}", "messages": messages, **answers})
    return found


@pytest.fixture
def pairs(tmp_path, tokenizer) -> Path:
    assert write_tokens(rows(), tokenizer, tmp_path / "tokens/mine") == {"val": 2, "train": 22}
    return tmp_path / "tokens/mine"


@pytest.fixture
def batches(pairs, tokenizer) -> list[dict]:
    config = DataConfig((SourceConfig(str(pairs)),))
    data = open_data(config, tokenizer, 128, TrainConfig(batch_size=12), readers=READERS)
    return data.train.batches(0, 2)


def by_hand(model: Transformer, tokenizer, row: dict, answer: str) -> torch.Tensor:
    """log p(answer and <eos> | dialogue), token by token from the logits."""
    asked = [{**m, "content": [tokenizer.encode(m["content"])]} for m in row["messages"]]
    prompt = tokenizer.render_prompt(asked)
    said = [*tokenizer.encode(answer), tokenizer.eos_id]
    log_probs = model(torch.tensor([[*prompt, *said]])).log_softmax(-1)[0]
    return sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(said))


def test_loss_and_gradients_are_those_of_the_formula(batches, pairs, tokenizer, model):
    reference, beta = copy.deepcopy(model), 0.3
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    objective = dpo(reference, beta)
    sums = forward_backward(model, batches, WORLD, Scaler(WORLD.device, "float32"), objective)
    found = [weight.grad.clone() for weight in model.parameters()]
    # The same twelve rows, one by one.
    config = DataConfig((SourceConfig(str(pairs)),))
    data = open_data(config, tokenizer, 128, TrainConfig(batch_size=12), readers=READERS)
    train = [row for n, row in enumerate(rows()) if n % 20]
    losses, wins = [], 0
    for position in range(12):
        row = train[data.train.mixture.place(position)[2]]
        after = [by_hand(model, tokenizer, row, row[key]) for key in ("chosen", "rejected")]
        before = [by_hand(reference, tokenizer, row, row[key]) for key in ("chosen", "rejected")]
        gain = [a - b.detach() for a, b in zip(after, before, strict=True)]
        losses.append(-torch.log(torch.sigmoid(beta * (gain[0] - gain[1]))))
        wins += int(gain[0] > gain[1])
    assert sums[0].item() == pytest.approx(sum(losses).item(), rel=1e-4)
    assert (int(sums[1]), int(sums[2])) == (12, wins)
    model.zero_grad()
    (sum(losses) / 12).backward()
    for weight, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_begins_at_log_two_and_moves_the_right_way(batches, model):
    objective = dpo(copy.deepcopy(model), 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        sums = forward_backward(model, batches, WORLD, Scaler(WORLD.device, "float32"), objective)
        losses.append(float(sums[0] / sums[1]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("micro", [1, 3, 9])
def test_the_split_into_micro_batches_does_not_matter(pairs, tokenizer, model, micro):
    config = DataConfig((SourceConfig(str(pairs)),))
    data = open_data(config, tokenizer, 128, TrainConfig(batch_size=12), readers=READERS)
    objective = dpo(Transformer(small_config(tokenizer.vocab_size)), 0.3)
    found = []
    for size in (2, micro):
        model.zero_grad()
        forward_backward(
            model, data.train.batches(0, size), WORLD, Scaler(WORLD.device, "float32"),
            objective,
        )  # fmt: skip
        found.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_without_pairs_gives_no_gradient(model):
    empty = {"tokens": torch.zeros(2, 1, dtype=torch.long),
             "targets": torch.full((2, 1), -100)}  # fmt: skip
    objective = dpo(copy.deepcopy(model))
    loss = objective.loss(model, empty)
    loss.loss_sum.backward()
    assert int(objective.count(empty)) == int(loss.n_targets) == 0
    assert all(w.grad is None or not w.grad.any() for w in model.parameters())
    assert answer_log_probs(model, empty).shape == (2, 0, 2)


def test_pairs_that_do_not_fit_together_are_dropped_and_counted(pairs, tokenizer):
    lengths = []
    full = open_source(SourceConfig(str(pairs)), "train", tokenizer, DataConfig(), 1000, READERS)
    for number in range(len(full)):
        pair = full.row(number, None)
        lengths.append(len(pair.chosen[0]) + len(pair.rejected[0]))
    assert isinstance(full, Pairs) and full.dropped == {"pair_does_not_fit": 0}
    limit = sorted(lengths)[10]
    less = open_source(SourceConfig(str(pairs)), "train", tokenizer, DataConfig(), limit, READERS)
    assert len(less) == sum(n <= limit for n in lengths) == 22 - less.dropped["pair_does_not_fit"]


@pytest.mark.parametrize("preference", [True, False])
def test_pairs_and_dialogues_are_not_mixed_up(pairs, token_root, tokenizer, preference):
    name = token_root / "chat" if preference else pairs
    config = DataConfig((SourceConfig(str(name)),))
    with pytest.raises(ConfigError, match="objective dpo and preference rows belong"):
        open_data(config, tokenizer, 128, TrainConfig(), READERS if preference else OTHERS)


BAD_ROWS = {
    "no question": ({"messages": []}, "bad_turns"),
    "an answer last": ({"messages": [{"role": "user", "content": "甲"},
                                     {"role": "assistant", "content": "乙"}]}, "bad_turns"),
    "blank": ({"rejected": " "}, "empty_text"),
    "no text": ({"chosen": 5}, "not_a_string"),
    "no list": ({"messages": "甲"}, "bad_messages"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_row_that_is_no_preference_is_refused(fault, tmp_path):
    changes, reason = BAD_ROWS[fault]
    write_rows(tmp_path / "rows.jsonl", [rows(1)[0] | changes])
    with pytest.raises(DataError, match=reason):
        list(read_rows(tmp_path / "rows.jsonl"))


@pytest.fixture
def config(tmp_path, pairs) -> Path:
    path = write_run(tmp_path / "run.yaml", pairs.parent)
    raw = yaml.safe_load(path.read_text("utf-8"))
    raw |= {"objective": "dpo", "dpo_beta": 0.5}
    raw["data"]["sources"] = [{"name": str(pairs)}]
    raw["optim"] |= {"lr": 1e-3}
    raw["regularise"] = {"dropout": 0.1}
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


@pytest.mark.parametrize("flags", [(), ("--lora.rank", "2")], ids=["full", "lora"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    config, checkpoint, script, tmp_path, flags
):
    words = ("sft.py", "--config", config, "--base", checkpoint, *flags)
    done = script(*words)
    assert done.code == 0, done.err
    steps = list_checkpoints(tmp_path / "run")
    (weights,) = {p.name for p in steps[-1].glob("*.safetensors")} - {"train_state.safetensors"}
    whole = load_file(steps[-1] / weights)
    shutil.rmtree(steps[-1])
    assert "continues at step 5" in script(*words).err
    again = load_file(list_checkpoints(tmp_path / "run")[-1] / weights)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    records = [json.loads(line) for line in
               (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
    val = [record for record in records if record["kind"] == "val"]
    assert val[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert val[0]["n_targets"] == 2 and "bpb" not in val[0]


def test_rows_become_token_files(tmp_path, tokenizer, script):
    out = tmp_path / "clean/mine/rows.jsonl"
    write_rows(out, rows(5))
    (tmp_path / "small.model").write_bytes(tokenizer.bytes)
    done = script("babyllama/tuning/preference.py", out, "--tokenizer", tmp_path / "small.model",
                  "--tokens", tmp_path / "tokens")  # fmt: skip
    assert done.code == 0 and "val 1, train 4" in done.out
    place = tmp_path / "tokens/small/mine"
    source = open_source(SourceConfig(str(place)), "train", tokenizer, DataConfig(), 128, READERS)
    for number, row in enumerate(rows(5)[1:]):
        for name, (_, targets) in source.row(number, None)._asdict().items():
            *learnt, last = [int(i) for i in targets if i >= 0]  # no earlier answer is
            assert tokenizer.decode(learnt) == row[name] and last == tokenizer.eos_id
    assert "wanted rows and the tokenizer" in script("babyllama/tuning/preference.py", out).error


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_is_no_positive_number_is_refused(beta, model):
    with pytest.raises(ConfigError, match="dpo_beta wants a number above 0"):
        dpo(model, beta)
