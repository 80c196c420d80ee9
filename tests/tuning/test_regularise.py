"""Regularisers: gradients against torch's own, noise of the right size, averages, exact resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from babyllama.checkpoint import load_model
from babyllama.data import open_data
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.errors import CheckpointError, ConfigError
from babyllama.optim import (
    OptimConfig,
    averaged,
    make_optimizer,
    move_averages,
    state_shapes,
)
from babyllama.run_dir import list_checkpoints
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import TrainConfig, evaluate
from babyllama.tuning.average import mean_weights, newest_steps
from babyllama.tuning.regularise import RegulariseConfig, lengths_of, regularise
from conftest import SMALL_PROMPTS, save_model, small_config, write_run
from model import IGNORED, SLICE, Transformer

VOCAB = 97
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])


def make(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(small_config(VOCAB, **changes))


def batch(rows: int = 3, length: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return ids[:, :-1], targets


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_smoothed_and_weighted_losses_are_those_of_torch(smoothing, weighted, tied):
    model, (tokens, targets) = make(tied=tied), batch()
    assert (targets != IGNORED).sum() < SLICE < tokens.numel()  # one slice, and ...
    tokens, targets = tokens.repeat(2, 1), targets.repeat(2, 1)  # ... two
    weights = torch.rand(targets.shape) if weighted else None
    found = model(tokens, targets, weights=weights, label_smoothing=smoothing)
    losses = F.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    )
    wanted = losses.sum() if weights is None else (losses * weights.flatten()).sum()
    torch.testing.assert_close(found.loss_sum, wanted)
    assert int(found.n_targets) == int((targets != IGNORED).sum())
    plain = model(tokens, targets)
    assert int(found.n_correct) == int(plain.n_correct)
    for one, other in zip(gradients(model, found.loss_sum), gradients(model, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_regularisers_work_in_training_alone_and_change_no_name():
    plain, model = make(), regularise(make(), RegulariseConfig(dropout=0.3, noise=5.0))
    tokens, _ = batch()
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(model.eval()(tokens), plain.eval()(tokens), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(7)
    first = model(tokens)
    torch.manual_seed(7)
    assert torch.equal(model(tokens), first)


def test_dropout_drops_its_share_and_keeps_the_mean():
    model = regularise(make(), RegulariseConfig(dropout=0.4)).train()
    outs = []
    model.layers[0].register_forward_pre_hook(lambda _, args: outs.append(args[0]))
    tokens, _ = batch(rows=64)
    model(tokens)
    kept = outs[0] != 0
    assert kept.float().mean() == pytest.approx(0.6, abs=0.01)
    torch.testing.assert_close(outs[0][kept], (model.tok_embeddings.weight[tokens] / 0.6)[kept])


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_noise_is_as_large_as_its_document_is_long(segments):
    alpha, model = 8.0, make()
    tokens = torch.arange(12).view(2, 6).repeat(200, 1)
    segments = None if segments is None else segments.repeat(200, 1)
    before = model.tok_embeddings(tokens).detach()
    regularise(model, RegulariseConfig(noise=alpha)).train()
    outs = []
    model.layers[0].register_forward_pre_hook(lambda _, args: outs.append(args[0]))
    with torch.no_grad():
        model(tokens, segments=segments)
    noise = (outs[0] - before).abs()
    lengths = torch.full(tokens.shape, 6) if segments is None else lengths_of(segments)
    bound = (alpha / (lengths * 32) ** 0.5)[..., None]
    assert bool((noise <= bound * 1.0001).all())
    # Uniform noise is half its bound in the mean.
    assert (noise / bound).mean() == pytest.approx(0.5, abs=0.01)


def test_lengths_are_those_of_the_documents():
    assert lengths_of(SEGMENTS).tolist() == [[3, 3, 3, 2, 2, 1], [1, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_average_follows_the_weights_and_changes_places_with_them(name):
    model = make()
    optimizer = make_optimizer(model, OptimConfig(name=name, ema=0.9, lr=1e-2))
    tokens, targets = batch()
    wanted = None
    for _ in range(4):
        model(tokens, targets).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        move_averages(optimizer)
        now = {n: w.detach().clone() for n, w in model.named_parameters()}
        wanted = now if wanted is None else {n: 0.9 * wanted[n] + 0.1 * w for n, w in now.items()}
    with averaged(model, optimizer):
        for n, weight in model.named_parameters():
            torch.testing.assert_close(weight, wanted[n])
    assert all(torch.equal(weight, now[n]) for n, weight in model.named_parameters())
    shapes = state_shapes(optimizer)
    for weight, state in optimizer.state.items():
        assert {key: value.shape for key, value in state.items()} == shapes[weight]


def test_without_the_option_no_average_is_kept():
    model = make()
    optimizer = make_optimizer(model, OptimConfig())
    model(*batch()).loss_sum.backward()
    optimizer.step()
    move_averages(optimizer)
    before = [w.detach().clone() for w in model.parameters()]
    with averaged(model, optimizer):
        assert all(map(torch.equal, before, model.parameters()))
    assert {key for state in optimizer.state.values() for key in state} == {
        "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


ALL = {
    "regularise": {"dropout": 0.2, "label_smoothing": 0.1, "noise": 5.0},
    "optim": {"lr": 1e-2, "warmup_steps": 2, "ema": 0.8},
}


def write_config(path: Path, token_root: Path, **sections: dict) -> Path:
    write_run(path, token_root, keep=9, save_every=2)
    raw = yaml.safe_load(path.read_text("utf-8"))
    raw["data"]["weight_by"] = "row"
    path.write_text(yaml.safe_dump(raw | ALL | sections), "utf-8")
    return path


@pytest.mark.parametrize("section", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_regularised_run_that_is_resumed_ends_as_one_that_was_not(
    section, tmp_path, token_root, checkpoint, script
):
    config = write_config(tmp_path / "run.yaml", token_root, **section)
    words = ("sft.py", "--config", config, "--base", checkpoint)
    assert script(*words).code == 0
    whole = contents(list_checkpoints(tmp_path / "run")[-1])
    for step in list_checkpoints(tmp_path / "run")[2:]:
        shutil.rmtree(step)
    resumed = script(*words)
    assert resumed.code == 0 and "continues at step 4" in resumed.err
    again = contents(list_checkpoints(tmp_path / "run")[-1])
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def contents(step: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}:{n}": t for p in step.glob("*.safetensors") for n, t in load_file(p).items()}


def test_the_average_is_what_is_evaluated_saved_and_loaded(
    tmp_path, token_root, tokenizer, checkpoint, script
):
    config = write_config(tmp_path / "run.yaml", token_root)
    assert script("sft.py", "--config", config, "--base", checkpoint).code == 0
    steps = list_checkpoints(tmp_path / "run")
    raw = [load_file(step / "train_state.safetensors") for step in steps]
    name = "layers.0.attention.wq.weight"
    loaded = load_model(steps[-1]).model
    kept = load_file(steps[-1] / "model.safetensors")
    assert torch.equal(loaded.state_dict()[name], kept[name])
    trained = raw[-1][f"{name}:average"]
    assert not torch.equal(trained, kept[name])
    # Step by step from the weights that trained: an average of 0.8 over two steps.
    earlier = load_file(steps[-2] / "model.safetensors")[name]
    assert (kept[name] - earlier).abs().max() < (trained - earlier).abs().max()
    losses = [json.loads(line) for line in
              (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
    sources = tuple(SourceConfig(str(token_root / name)) for name in ("chat", "summary"))
    data = open_data(DataConfig(sources, SMALL_PROMPTS), tokenizer, 128, TrainConfig(), READERS)
    world = World(0, 1, torch.device("cpu"))
    figures = evaluate(loaded, data.val, 2, Scaler(world.device, "float32"), world)
    assert losses[-1]["kind"] == "val" and losses[-1]["step"] == 10
    assert figures["loss"] == pytest.approx(losses[-1]["loss"], rel=1e-5)
    best = yaml.safe_load((tmp_path / "run/best/model.yaml").read_text("utf-8"))
    assert best["val_loss"] == min(r["loss"] for r in losses if r["kind"] == "val" and r["step"])


def test_the_mean_of_checkpoints_is_that_of_their_weights(tmp_path, token_root, checkpoint, script):
    config = write_config(tmp_path / "run.yaml", token_root, optim={"lr": 1e-2})
    assert script("sft.py", "--config", config, "--base", checkpoint).code == 0
    done = script("babyllama/tuning/average.py", tmp_path / "run", "--last", 3)
    assert done.code == 0, done.err
    steps = list_checkpoints(tmp_path / "run")[-3:]
    assert all(step.name in done.out for step in steps)
    found = load_model(tmp_path / "run_mean")
    parts = [load_file(step / "model.safetensors") for step in steps]
    for name, weight in found.model.state_dict().items():
        wanted = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-6)
    assert (found.step, found.kind) == (10, "sft")
    both = tmp_path / "both"
    done = script(
        "babyllama/tuning/average.py", tmp_path / "run", tmp_path / "run_mean", "--out", both
    )
    assert done.code == 0, done.err
    ends = [load_file(steps[-1] / "model.safetensors"), found.model.state_dict()]
    for name, weight in load_model(both).model.state_dict().items():
        wanted = sum(end[name].double() for end in ends if name in end) / 2
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-6)
    again = script("babyllama/tuning/average.py", tmp_path / "run", "--last", 3)
    assert "wanted a new directory, found files" in again.error
    many = script(
        "babyllama/tuning/average.py", tmp_path / "run", "--last", 9, "--out", tmp_path / "x"
    )
    assert "wanted 9 checkpoints to average, found 5" in many.error
    with pytest.raises(ConfigError, match="wanted 9"):
        newest_steps(tmp_path / "run", 9)


def test_checkpoints_of_two_shapes_are_not_averaged(tmp_path, checkpoint, tokenizer):
    other = Transformer(small_config(tokenizer.vocab_size, n_layers=1))
    step = save_model(tmp_path / "other", other, tokenizer)
    with pytest.raises(CheckpointError, match="found others"):
        mean_weights([checkpoint, step])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--regularise.dropout", "1"), "regularise.dropout wants 0 to below 1, found 1"),
        (("--regularise.noise", "-5"), "regularise.noise wants 0 or more, found -5"),
        (("--regularise.label_smoothing", "-1"), "regularise.label_smoothing wants"),
        (("--optim.ema", "1"), "optim.ema wants 0 to below 1, found 1"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line(flags, message, tmp_path, token_root, checkpoint, script):
    config = write_run(tmp_path / "run.yaml", token_root)
    assert message in script("sft.py", "--config", config, "--base", checkpoint, *flags).error
