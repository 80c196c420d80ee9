"""Adapters and peft: what one of them computes, the other does after the files have gone over."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from babyllama import lora
from babyllama.checkpoint import load_model, model_weights, read_adapter
from babyllama.lora import LoraConfig, apply_lora, stored
from benchmarks.peers import hf_copy
from conftest import TEXTS, save_adapter
from export.hf import hf_names
from export.parity import Material
from export.peft import (
    prove,
    renamed,
    write_peft,
)
from test_lora import ALL, LAYERS, TOKENS, adapted, make

# peft still asks for it, and transformers 5 warns.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PEFT_TARGETS = [("wq", "wv"), LAYERS, ALL, ("layers.1.attention.wo", "w2")]


def export_peft(model, out: Path) -> Path:
    out.mkdir()
    write_peft(lora.settings(model), model_weights(model), out)
    return out


@pytest.mark.parametrize("targets", PEFT_TARGETS, ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_computes_the_same_in_peft(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = adapted(targets=targets, rslora=len(targets) == 2)
    export_peft(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(hf_copy(make()), tmp_path / "ours").eval()
    torch.testing.assert_close(peer(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)


def test_the_names_of_layers_are_those_of_the_parity_test():
    names = hf_names(make().config)
    for path, module in make().named_modules():
        if isinstance(module, nn.Linear):
            inside = "model." if path.startswith("layers.") else ""
            assert names[f"{path}.weight"] == f"{inside}{renamed(path)}.weight"


def edit_json(path: Path, **changes: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.fixture
def saved(tmp_path, checkpoint) -> Path:
    """An adapter of the small checkpoint."""
    base = load_model(checkpoint)
    cfg = LoraConfig(rank=2, alpha=3.0, targets=("wq", "w2"))
    model = apply_lora(base.model, cfg, base=str(checkpoint), seed=5)
    with torch.no_grad():
        for weight in stored(model).values():
            weight.normal_(std=0.1)
    return save_adapter(model, tmp_path / "ours")


@pytest.fixture
def lines(tmp_path) -> Path:
    """Text to compare on."""
    path = tmp_path / "lines.txt"
    path.write_text(
        "".join(f"{text[n:]}第{n}行\n" for n in range(25) for text in TEXTS[:4]), "utf-8"
    )
    return path


def test_the_command_turns_a_saved_adapter_into_peft(tmp_path, checkpoint, saved, lines, script):
    pytest.importorskip("peft")
    words = ("--out", tmp_path / "peft", "--text", lines)
    done = script("export/peft.py", saved, *words)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "peft/parity.json").read_text("utf-8"))
    assert report["passed"] and report["versions"]["peft"]
    assert report["logits"]["prompts"] == 100 and report["logits"]["largest_difference"] < 1e-5
    assert report["replies"]["equal"] == report["replies"]["prompts"] == 50
    assert "exists; name another" in script("export/peft.py", saved, *words).error
    found = script("export/peft.py", checkpoint, "--out", tmp_path / "x")
    assert "wanted an adapter, found whole weights" in found.error
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_peft_sees_otherwise_is_noticed(tmp_path, checkpoint, saved, lines):
    pytest.importorskip("peft")
    material = Material(lines.read_text("utf-8").splitlines(), "")
    (tmp_path / "theirs").mkdir()
    write_peft(*read_adapter(saved)[1:], tmp_path / "theirs")
    for alpha, is_equal in ((3.0, True), (9.0, False)):
        edit_json(tmp_path / "theirs", lora_alpha=alpha)
        report = prove(load_model(checkpoint), saved, tmp_path / "theirs", material)
        assert report["logits"]["passed"] == is_equal


def test_an_adapter_whose_base_was_moved_needs_its_new_place(
    tmp_path, checkpoint, saved, lines, script
):
    pytest.importorskip("peft")
    moved = checkpoint.rename(tmp_path / "step-000009")
    words = ("export/peft.py", saved, "--out", tmp_path / "peft", "--text", lines)
    assert re.search(
        r"wanted its base .* found none in .*; name it with --base", script(*words).error
    )
    assert not (tmp_path / "peft").exists()
    assert script(*words, "--base", moved).code == 0
