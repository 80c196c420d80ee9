"""Laws of a released model: small, verified, the same model whichever way it is run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from babyllama import checkpoint
from babyllama.checkpoint import load_model
from babyllama.config import REPO
from babyllama.cpu import compile
from babyllama.cpu.decoder import make_decoder
from babyllama.errors import CheckpointError
from babyllama.generate import generate
from babyllama.rows import write_rows
from babyllama.sampling import SamplingConfig
from babyllama.scoring.prompts import SummaryPrompts
from conftest import TEXTS, save_model, small_config
from export import release
from export.release import ReleaseConfig, compare_perplexity
from model import Transformer
from tokenizer import Tokenizer

LINES = [f"{text[k:]}第{k}行" for k in range(30) for text in TEXTS if "\n" not in text]
needs_compiler = pytest.mark.skipif(not compile.compiler(), reason="there is no C compiler")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("release")
    (place / "lines.txt").write_text("\n".join(LINES), "utf-8")
    return place


@pytest.fixture(scope="module")
def source(root: Path, tokenizer: Tokenizer) -> Path:
    """A tied model with norms that matter."""
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer.vocab_size, tied=True, n_kv_heads=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + (weight.dim() == 1))
    return save_model(root / "out/small", model, tokenizer, step=7)


@pytest.fixture(scope="module")
def released(root: Path, source: Path) -> Path:
    """The directory, as the command writes it."""
    release.main(ReleaseConfig(source, root / "release", text=root / "lines.txt"))
    return root / "release"


def test_a_release_is_a_checkpoint_of_a_quarter_of_the_size(released, source):
    found, wanted = load_model(released), load_model(source)
    size, before = ((place / "model.safetensors").stat().st_size for place in (released, source))
    assert size < 0.45 * before  # 32 weights of a row cost 32 bytes and a scale of 4
    assert not (released / "train_state.safetensors").exists()
    assert (found.step, found.kind, found.config) == (wanted.step, wanted.kind, wanted.config)
    assert found.tokenizer.fingerprint == wanted.tokenizer.fingerprint
    for name, weight in wanted.model.state_dict().items():
        gap = (found.model.state_dict()[name] - weight).abs()
        largest = weight.abs().amax(-1, keepdim=True) if weight.dim() == 2 else weight * 0
        assert (gap <= 0.501 * largest / 127).all(), name


def test_a_float16_copy_is_half_the_size_and_nearer_than_int8(root, released, source):
    cfg = ReleaseConfig(source, root / "half", weights="float16", text=root / "lines.txt")
    release.main(cfg)
    found, rough, wanted = map(load_model, (root / "half", released, source))
    stored = load_file(root / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, weight in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight.half().float()), name
    table = wanted.model.tok_embeddings.weight
    near, far = ((one.model.tok_embeddings.weight - table).abs().max() for one in (found, rough))
    assert near < far
    assert json.loads((root / "half/parity.json").read_text("utf-8"))["type"] == "float16"


def test_every_file_is_checked(released, tmp_path):
    sums = json.loads((released / "checksums.json").read_text())
    assert sums.keys() == {"model.safetensors", "model.yaml", "tokenizer.model"}
    for name in sums:
        place = tmp_path / name
        place.mkdir()
        for path in released.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 1
        (place / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"fails its checksum in {name}"):
            load_model(place)


@needs_compiler
def test_run_as_int8_or_as_float32_it_is_one_model(released):
    loaded = load_model(released)
    stored = load_file(released / "model.safetensors")
    again = release.narrow(checkpoint.model_weights(loaded.model))
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.allclose(again[name].float(), tensor.float(), rtol=1e-6), name
        assert tensor.dtype != torch.int8 or torch.equal(again[name], tensor), name
    prompts = [loaded.tokenizer.encode(line)[:20] for line in LINES[:8]]
    greedy = SamplingConfig(temperature=0, max_new_tokens=20)
    wide, narrow = (
        generate(make_decoder(loaded.model, kind), prompts, greedy, -1)
        for kind in ("float32", "int8")
    )
    assert sum(a == b for a, b in zip(wide, narrow, strict=True)) >= 7  # near ties may fall


def test_the_report_tells_what_rounding_does(released, source):
    report = json.loads((released / "parity.json").read_text("utf-8"))
    found = report["perplexity_of_text"]
    assert report["passed"] and found["passed"] and found["float32"] > 1
    assert abs(found["ratio"] - 1) < 0.005 and found["ratio"] != 1
    assert 0 < report["logits"]["largest_difference"] < 1
    assert report["rounding"]["prompts"] == 50 and 0 < report["rounding"]["mean_divergence"] < 0.01
    assert report["size"]["bytes"] == sum(
        path.stat().st_size for path in released.iterdir() if path.name != "parity.json"
    )
    over, under = (compare_perplexity(10, after, "int8")["passed"] for after in (10.06, 10.04))
    assert under and not over


def test_perplexity_of_a_source_is_measured_too(source, root, tmp_path):
    rows = [
        {"id": f"a/{n}", "messages": [{"role": "user", "content": "写一句。"},
                                      {"role": "assistant", "content": line}]}
        for n, line in enumerate(LINES[:8])
    ]  # fmt: skip
    write_rows(tmp_path / "chat/val-00000.jsonl", rows)
    cfg = ReleaseConfig(
        source, tmp_path / "r", source=str(tmp_path / "chat"), text=root / "lines.txt"
    )
    release.main(cfg)
    report = json.loads((tmp_path / "r/parity.json").read_text("utf-8"))
    assert report["perplexity_of_source"]["tokens"] > 50
    assert report["perplexity_of_source"]["passed"] and report["perplexity_of_source"]["bound"]
    assert report["perplexity_of_text"]["ratio"] and report["perplexity_of_text"]["bound"] is None


def test_what_is_too_large_is_not_written(source, root, tmp_path, script):
    out = tmp_path / "r"
    argv = ("--out", out, "--text", root / "lines.txt", "--max_mib", 0.01)
    found = script("export/release.py", source, *argv)
    assert "size" in found.error and not out.exists()


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_scales_that_do_not_fit_are_refused(fault, released, tmp_path):
    for path in released.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "layers.0.attention.wq.weight.scales"
    scales = tensors.pop(name)
    if fault == "short":
        tensors[name] = scales[1:]
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint.write_sums(tmp_path)
    with pytest.raises(CheckpointError, match=r"wanted .*wq.weight.scales with a number for each"):
        load_model(tmp_path)


def test_a_release_can_be_trained_on(released):
    assert yaml.safe_load((released / "model.yaml").read_text())["weights"] == "int8"
    model = load_model(released).model
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_the_model_of_this_repository_answers_and_writes_titles(script):
    """What a fresh clone opens: small, whole, and able to do what its card says."""
    place = REPO / "release"
    assert sum(path.stat().st_size for path in place.rglob("*")) < 16 * 2**20
    loaded = load_model(place)
    assert loaded.kind == "sft" and loaded.config.tied
    said = script("chat.py", "release", "--prompt", "谢谢！", "--temperature", "0")
    assert "不客气" in said.out
    text = (
        "针对移动机器人在未知环境中的路径规划问题,提出了一种基于改进蚁群算法的路径规划方法。该方法在信息素更新中引入"
        "距离因子,加快了收敛速度。仿真结果表明,改进蚁群算法能有效地为移动机器人规划出较优的路径。"
    )
    prompts = SummaryPrompts.load(REPO / "configs/prompts/summary_zh.yaml", loaded.tokenizer)
    ids, was_cut = prompts.eval_prompt(text, 400)
    (reply,) = generate(loaded.model, [ids], SamplingConfig(40, 0.0), loaded.tokenizer.eos_id)
    title = prompts.strip_frame(loaded.tokenizer.decode(reply))
    assert not was_cut and 5 < len(title) < 40
    assert len(set(title) & set(text)) > 0.6 * len(set(title)), title


def test_the_model_of_this_repository_knows_its_name_in_any_turn():
    loaded = load_model(REPO / "release")
    talk = ("你好", "你好！很高兴见到你。", "我今天好累", "辛苦了，早点休息吧。")
    roles = ("user", "assistant") * 2
    turns = [{"role": r, "content": c} for r, c in zip(roles, talk, strict=True)]
    asked = [
        loaded.tokenizer.render_prompt([*turns[:n], {"role": "user", "content": question}])
        for n in (0, 2, 4)
        for question in ("你是谁？", "你叫什么名字？", "谁开发了你？")
    ]
    replies = generate(loaded.model, asked, SamplingConfig(40, 0.0), loaded.tokenizer.eos_id)
    said = [loaded.tokenizer.decode(reply) for reply in replies]
    assert all("babyllama" in text for text in said), said
