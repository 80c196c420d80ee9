"""A run that trains an adapter: what it leaves behind, how it goes on, and what it needs."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from babyllama.checkpoint import load_adapter, load_model
from babyllama.errors import CheckpointError
from babyllama.run_dir import list_checkpoints
from conftest import save_model, write_run

TOKENS = torch.arange(3, 67).view(2, 32)
ADAPTER = ["adapter.safetensors", "adapter.yaml", "checksums.json", "model.yaml"]


@pytest.fixture
def config(tmp_path, token_root) -> Path:
    """A run of ten steps whose adapter drops inputs, on two sets."""
    path = write_run(tmp_path / "run.yaml", token_root)
    raw = yaml.safe_load(path.read_text("utf-8"))
    raw["lora"] = {"rank": 4, "dropout": 0.2, "targets": ["wq", "wv", "w2"]}
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


def last(run: Path) -> Path:
    return list_checkpoints(run)[-1]


def test_a_run_leaves_its_adapter_alone_and_loads_as_a_plain_model(
    config, checkpoint, script, tmp_path
):
    done = script("sft.py", "--config", config, "--base", checkpoint)
    assert done.code == 0, done.err
    assert "LoRA default: rank 4" in done.err and "2 x attention.wv" in done.err
    step = last(tmp_path / "run")
    files = sorted(f.name for f in step.iterdir())
    state = ["tokenizer.model", "train_state.json", "train_state.safetensors"]
    assert files == [*ADAPTER, *state]
    assert sorted(f.name for f in (tmp_path / "run/best").iterdir()) == [*ADAPTER, state[0]]
    loaded, base = load_model(step), load_model(checkpoint)
    assert not torch.equal(loaded.model(TOKENS), base.model(TOKENS))
    assert loaded.model.state_dict().keys() == base.model.state_dict().keys()
    assert (loaded.step, loaded.kind) == (10, "sft")
    assert loaded.tokenizer.path == base.tokenizer.path
    unmerged = load_adapter(load_model(checkpoint).model, tmp_path / "run")
    torch.testing.assert_close(unmerged(TOKENS), loaded.model(TOKENS), rtol=0, atol=1e-5)
    moments = load_file(step / "train_state.safetensors")
    assert all(".lora.default." in name for name in moments if name != "rng")


def test_a_run_and_its_checkpoint_need_the_base_they_began_with(
    config, checkpoint, script, tmp_path, model, tokenizer
):
    words = ("sft.py", "--config", config, "--base", checkpoint)
    assert script(*words).code == 0
    step, run = last(tmp_path / "run"), tmp_path / "run"
    moved = checkpoint.rename(checkpoint.with_name("step-000008"))
    with pytest.raises(
        CheckpointError, match=r"holds an adapter alone, and its base .* is not there"
    ):
        load_model(step)
    moved.rename(checkpoint)
    # Another base in the place of the first.
    with torch.no_grad():
        model.norm.weight += 0.1
    save_model(checkpoint.parent, model, tokenizer, step=7)
    shutil.rmtree(step)
    assert "its adapter belongs to the base" in script(*words).error
    with pytest.raises(CheckpointError, match="its adapter belongs to the base"):
        load_model(run)


def test_a_run_can_start_from_an_adapted_one(config, checkpoint, script, tmp_path):
    assert script("sft.py", "--config", config, "--base", checkpoint).code == 0
    other = ("--name", tmp_path / "second", "--base", tmp_path / "run", "--lora.rank", "2")
    assert script("sft.py", "--config", config, *other).code == 0
    second = load_model(tmp_path / "second").model
    first = load_model(tmp_path / "run").model
    assert not torch.equal(second(TOKENS), first(TOKENS))
    settings = yaml.safe_load((last(tmp_path / "second") / "adapter.yaml").read_text("utf-8"))
    assert settings["rank"] == 2 and settings["base"].endswith("run/step-000010")


def test_without_the_section_all_weights_train(config, checkpoint, script, tmp_path):
    words = ("sft.py", "--config", config, "--base", checkpoint, "--lora", "null")
    assert script(*words).code == 0
    assert (last(tmp_path / "run") / "model.safetensors").is_file()
