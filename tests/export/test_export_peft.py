"""Adapters and peft: what one of them computes, the other does after the files have gone over."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from babyllama import lora
from babyllama.checkpoint import load_adapter, load_model, model_weights, read_adapter, save_adapter
from babyllama.errors import CheckpointError
from babyllama.lora import LoraConfig, apply_lora, fingerprint, stored
from benchmarks.peers import hf_copy
from conftest import TEXTS
from export.hf import hf_names
from export.parity import Material
from export.peft import (
    HF_PARTS,
    OUR_PARTS,
    import_peft,
    prove,
    renamed,
    write_peft,
)
from test_lora import ALL, LAYERS, TOKENS, adapted, make

PEFT_TARGETS = [("wq", "wv"), LAYERS, ALL, ("layers.1.attention.wo", "w2")]


def export_peft(model, out: Path) -> Path:
    out.mkdir()
    write_peft(lora.settings(model), model_weights(model), out)
    return out


@pytest.mark.parametrize("targets", PEFT_TARGETS, ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_goes_to_peft_and_back(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = adapted(targets=targets, rslora=len(targets) == 2)
    export_peft(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(hf_copy(make()), tmp_path / "ours").eval()
    torch.testing.assert_close(peer(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
    peer.save_pretrained(tmp_path / "theirs")
    again = import_peft(make(), tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    assert stored(again).keys() == stored(model).keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_comes_to_us(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=6, lora_alpha=9, lora_dropout=0.1, use_rslora=rslora, init_lora_weights=False,
        target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    peer = peft.get_peft_model(hf_copy(make()), config).eval()
    peer.save_pretrained(tmp_path)
    model = import_peft(make(), tmp_path)
    assert not torch.equal(model(TOKENS), make()(TOKENS))
    torch.testing.assert_close(model(TOKENS), peer(TOKENS).logits, rtol=0, atol=1e-5)


def test_the_names_of_layers_are_those_of_the_parity_test():
    names = hf_names(make().config)
    for path, module in make().named_modules():
        if isinstance(module, nn.Linear):
            name = renamed(path, HF_PARTS)
            inside = "model." if path.startswith("layers.") else ""
            assert names[f"{path}.weight"] == f"{inside}{name}.weight"
            assert renamed(name, OUR_PARTS) == path


def edit_json(path: Path, **changes: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, r"wanted a plain LoRA of named layers, found \{'use_dora': True\}"),
        ({"modules_to_save": ["lm_head"]}, "found .'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 2}}, "found .'rank_pattern'"),
        ({"a_later_method": 1}, "found .'a_later_method'"),
        ({"peft_type": "IA3"}, "found .'peft_type': 'IA3'"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"init_lora_weights": "pissa"}, "found .'init_lora_weights': 'pissa'"),
        ({"r": 5}, r"wq\.a: wanted \(5, 32\), found \(4, 32\)"),
        ({"r": "x"}, "wanted peft's settings"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(tmp_path, changes, message):
    export_peft(adapted(targets=("wq",)), tmp_path / "x")
    edit_json(tmp_path / "x", **changes)
    model = make()
    with pytest.raises(CheckpointError, match=message):
        import_peft(model, tmp_path / "x")
    assert not hasattr(model, "lora")


def test_a_foreign_tensor_and_a_missing_file_are_refused(tmp_path):
    path = export_peft(adapted(targets=("wq",)), tmp_path / "x")
    tensors = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {key: make().output.weight.detach()}, path / "adapter_model.safetensors")
    import_peft(make(), path)  # the base's own table is no adapter's, and changes nothing
    save_file(tensors | {key: torch.zeros(97, 32)}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"found also base_model\.model\.lm_head"):
        import_peft(make(), path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it lacks \['adapter_config\.json'\]"):
        import_peft(make(), path)


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


def test_the_command_turns_a_saved_adapter_into_peft_and_back(
    tmp_path, checkpoint, saved, lines, script
):
    pytest.importorskip("peft")
    done = script("export/peft.py", saved, "--out", tmp_path / "peft", "--text", lines)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "peft/parity.json").read_text("utf-8"))
    assert report["passed"] and report["versions"]["peft"]
    assert report["logits"]["prompts"] == 100 and report["logits"]["largest_difference"] < 1e-5
    assert report["replies"]["equal"] == report["replies"]["prompts"] == 50
    words = ("export/peft.py", checkpoint, "--from", tmp_path / "peft", "--out", tmp_path / "back")
    assert script(*words).code == 0
    assert "exists; name another" in script(*words).error
    model = load_adapter(load_model(checkpoint).model, saved)
    again = load_adapter(load_model(checkpoint).model, tmp_path / "back")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.lora.fingerprint == fingerprint(model) and again.lora.base == str(checkpoint)
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
