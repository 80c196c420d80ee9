"""Dropout: its share, exact resume; the mean of checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from babyllama.checkpoint import load_model
from babyllama.errors import CheckpointError, ConfigError
from babyllama.run_dir import list_checkpoints
from babyllama.tuning.average import mean_weights, newest_steps
from babyllama.tuning.regularise import RegulariseConfig, regularise
from conftest import save_model, small_config, write_run
from model import IGNORED, Transformer

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


def test_regularisers_work_in_training_alone_and_change_no_name():
    plain, model = make(), regularise(make(), RegulariseConfig(dropout=0.3))
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


ALL = {
    "regularise": {"dropout": 0.2},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
}


def write_config(path: Path, token_root: Path, **sections: dict) -> Path:
    write_run(path, token_root, keep=9, save_every=2)
    raw = yaml.safe_load(path.read_text("utf-8"))
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
    ],
    ids=str,
)
def test_wrong_settings_are_one_line(flags, message, tmp_path, token_root, checkpoint, script):
    config = write_run(tmp_path / "run.yaml", token_root)
    assert message in script("sft.py", "--config", config, "--base", checkpoint, *flags).error
