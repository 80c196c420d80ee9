"""What `--dry-run` computes: parts that add up, memory that grows with what is kept, MFU."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from babyllama.analysis.estimate import (
    CONTEXT_GB,
    available_gb,
    largest_batch,
    memory_by_part,
    parameters_by_part,
)
from babyllama.analysis.watch import (
    flops_per_token,
    measured_peak,
    mfu_per_rate,
    peak_flops,
    tabulated_peak,
)
from babyllama.config import REPO
from babyllama.cuda.attention import CARD_SLICE
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.log import read_metrics
from commands import refused
from conftest import small_config, write_run
from model import SLICE, ModelConfig, Transformer
from tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_all_parameters(tied: bool) -> None:
    model = Transformer(small_config(tied=tied))
    assert sum(parameters_by_part(model).values()) == model.n_parameters()


def test_memory_follows_what_is_kept() -> None:
    config = small_config()

    def memory(**changes: object) -> dict[str, float]:
        return memory_by_part(**{"config": config, "n_parameters": 1000, "sequences": 8,
                                 "precision": "float32"} | changes)  # fmt: skip

    plain = memory()
    assert plain["weights"] + plain["gradients"] + plain["optimizer"] == pytest.approx(16e-6)
    assert memory(sequences=16)["activations"] == pytest.approx(2 * plain["activations"])
    half = memory(precision="bfloat16")
    assert 0.5 < half["activations"] / plain["activations"] < 0.75  # the residual stream is wide
    assert half["weights"] < 1.5 * plain["weights"]  # a copy of the matrices, half as wide
    adapter = memory(n_trained=10, n_state=20)
    assert adapter["weights"] == plain["weights"]
    assert (adapter["gradients"], adapter["optimizer"]) == pytest.approx((40e-9, 80e-9))
    assert memory(recompute=True)["activations"] < plain["activations"]
    assert memory(shares=4)["optimizer"] == pytest.approx(plain["optimizer"] / 4)
    assert plain["loss slice"] == pytest.approx((SLICE * 97 * 8 + 4 * 97 * 32) / 1e9)
    on_card = memory(is_card=True, precision="bfloat16")
    assert on_card["loss slice"] == pytest.approx((CARD_SLICE * 97 * 10 + 8 * 97 * 32) / 1e9)
    assert "mask" not in plain
    assert memory(is_masked=True)["mask"] == pytest.approx(8 * 128 * 128 * 5 / 1e9)
    assert memory(shares=4)["gradients"] == pytest.approx(plain["gradients"] / 4)
    whole = memory(shares=4, accumulates=True)  # until the last micro-batch
    assert whole["gradients"] == plain["gradients"] and whole["weights"] < plain["weights"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_activations_are_about_those_that_autograd_keeps(precision: str) -> None:
    config = ModelConfig(
        dim=64, n_layers=4, n_heads=4, multiple_of=64, vocab_size=8, max_seq_len=64
    )
    model, kept = Transformer(config), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[0] in (8, 8 * 64):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # which so keeps its place
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        Scaler(CPU, precision).autocast(),
    ):
        hidden = model.hidden(torch.zeros(8, 64, dtype=torch.int64))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e9
    wanted = memory_by_part(config, 0, 8, precision)["activations"]
    assert hidden.requires_grad and wanted == pytest.approx(found, rel=0.1)


ONE_STEP = """
import sys
import torch
from babyllama.analysis.estimate import memory_by_part
from babyllama.device import DeviceConfig, memory_gb, open_scaler
from babyllama.distributed import World
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.trainer import forward_backward
from model import ModelConfig, Transformer

CPU = torch.device("cpu")

def step(batch, n_steps=1, **shape):
    config = ModelConfig(**shape)
    model = Transformer(config)
    optimizer, scaler = make_optimizer(model, OptimConfig()), open_scaler(CPU, DeviceConfig())
    for _ in range(n_steps):
        ids = torch.randint(0, config.vocab_size, (batch, config.max_seq_len + 1))
        parts = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
        forward_backward(model, [parts], World(0, 1, CPU), scaler)
        scaler.step(optimizer, list(model.parameters()), 1.0)
    return memory_by_part(config, model.n_parameters(), batch, scaler.precision)

step(1, dim=32, vocab_size=64, n_layers=1, max_seq_len=8)
program_gb = memory_gb(CPU)  # with all the code that a step brings in
batch, length, vocabulary, layers = map(int, sys.argv[1:])
parts = step(batch, 2, max_seq_len=length, vocab_size=vocabulary, n_layers=layers)
print(program_gb + sum(parts.values()), memory_gb(CPU))
"""


@pytest.mark.parametrize("point", ["2 512 30000 8"])
def test_a_real_step_takes_the_memory_that_was_computed(point: str) -> None:
    """Within a fifth, the program itself included: the peak of a process that does nothing else."""
    command = [sys.executable, "-c", ONE_STEP, *point.split()]
    out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    computed_gb, peak_gb = map(float, out.split())
    assert computed_gb == pytest.approx(peak_gb, rel=0.2)


def sizes_in(said: str) -> dict[str, float]:
    """The figures of a dry run by their names, all but the last line."""
    return {line[:12].strip(): float(line[12:].split()[0].replace(",", ""))
            for line in said.splitlines()[:-1]}  # fmt: skip


def test_a_dry_run_says_what_a_run_takes(
    tmp_path: Path, token_root: Path, tokenizer: Tokenizer, script: Callable
) -> None:
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer)
    said = script("pretrain.py", "--config", config, "--dry-run")
    sizes = sizes_in(said.out)
    parts = ("weights", "gradients", "optimizer", "activations", "loss slice", "program")
    assert sum(sizes[name] for name in parts) == pytest.approx(sizes["together"], abs=0.003)
    assert said.code == 0 and sizes["peak"] == pytest.approx(sizes["together"], rel=0.2)
    assert "tokens on 1 x cpu in float32" in said.out and "10 probing steps" in said.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_dry_run_before_there_is_anything_says_every_step_to_the_run(
    has_tokenizer: bool, tmp_path: Path, tokenizer: Tokenizer, script: Callable
) -> None:
    config = write_run(tmp_path / "run.yaml", tmp_path, tokenizer)
    words = ["--config", str(config), "--data.sources", "[{name: wiki}]", "--device.device", "cpu"]
    if not has_tokenizer:
        words += ["--tokenizer", "data/tokenizers/zz_none.model"]
    said = script("pretrain.py", "--dry-run", *words)
    assert said.code == 0, said
    n_pieces = tokenizer.vocab_size if has_tokenizer else 65_000
    assert f"assumed: a vocabulary of {n_pieces:,}, 250,000,000 tokens an epoch" in said.out
    assert f"embedding    {32 * n_pieces:>14,} parameters" in said.out
    assert f"{10} steps of {4 * 128} tokens" in said.out and "on an RTX 3090" in said.out
    commands = [shlex.split(line) for line in said.out.splitlines() if line.startswith("python ")]
    starts = [" ".join(words[1:4]) for words in commands]
    trained = [["tokenizer.py train --rows"], []][has_tokenizer]
    run = "-m data_process.run wiki"
    assert starts[:-2] == ["-m data_process.fetch wiki", run, *trained, run]
    for command in commands:
        assert not refused(*command[2 if command[1] == "-m" else 1 :]), command
    assert commands[-1][1:-2] == ["pretrain.py", *words]
    assert not (tmp_path / "run").exists()


def test_a_chinese_dry_run_prints_the_same_commands(
    tmp_path: Path, tokenizer: Tokenizer, script: Callable
) -> None:
    config = write_run(tmp_path / "run.yaml", tmp_path, tokenizer)
    words = ("--config", config, "--data.sources", "[{name: wiki}]", "--device.device", "cpu")
    said = [script("pretrain.py", "--dry-run", "--lang", lang, *words).out for lang in ("en", "zh")]
    english, chinese = (re.findall(r"^python .*", text, re.MULTILINE) for text in said)
    assert english == chinese and len(english) == 5
    assert "# 在本机训练" in said[1] and "或用 RTX 3090：" in said[1]


def test_the_disk_holds_the_weights_and_the_state_of_each_checkpoint(
    tmp_path: Path, token_root: Path, tokenizer: Tokenizer, script: Callable
) -> None:
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer, keep=1)
    sizes = sizes_in(script("pretrain.py", "--config", config, "--dry-run").out)
    assert sizes["disk"] == pytest.approx(2 * 3 * sizes["weights"], abs=0.004)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_steps_foretell_the_speed_and_the_memory_of_a_run(
    tmp_path: Path, token_root: Path, tokenizer: Tokenizer
) -> None:
    """Within a fifth. By turns and the best of each, for whatever else the machine does."""
    flags = "--model.dim=256 --model.n_layers=4 --train.eval_every=99 --train.log_every=5"
    flags += " --train.batch_size=8 --train.micro_batch_size=8 --train.max_steps=15"
    foretold, found, parts = [], [], {}
    for turn in range(2):
        config = write_run(tmp_path / f"{turn}.yaml", token_root, tokenizer)
        command = [sys.executable, "pretrain.py", "--config", str(config), *flags.split()]
        said = subprocess.run([*command, "--dry-run"], cwd=REPO, capture_output=True, text=True)
        parts = sizes_in(said.stdout)
        foretold.append(float(re.search(r"([\d,]+) tokens/s", said.stdout)[1].replace(",", "")))
        subprocess.run(command, cwd=REPO, check=True, capture_output=True)
        figures = [r for r in read_metrics(tmp_path / str(turn)) if r["kind"] == "train"]
        found += [r["tokens_per_s"] for r in figures]
    print(f"tokens/s: foretold {foretold}, found {found}")
    print(f"memory: foretold {parts['together']}, found {figures[-1]['mem_gb']}")
    assert max(foretold) == pytest.approx(max(found), rel=0.2)
    assert parts["together"] == pytest.approx(figures[-1]["mem_gb"], rel=0.2)


def test_the_cards_in_the_documents_take_the_batches_that_are_computed() -> None:
    """Of each row of docs/train.md; 0.5 GB are the driver's."""
    rows = re.findall(
        r"^\| (43|400)M \| .*?, (\d+) GB \| (\w+) \| ([\d,]+) \| ([\d,]+) \|",
        (REPO / "docs/train.md").read_text("utf-8"), re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == 6
    for name, size, precision, *most in rows:
        shape = yaml.safe_load((REPO / f"configs/model/{name}m.yaml").read_text("utf-8"))
        config = replace(ModelConfig(**shape), vocab_size=65_000)
        for recompute, said in zip((False, True), most, strict=True):
            one, two = (
                memory_by_part(config, config.n_parameters, n, precision, recompute, is_card=True)
                for n in (1, 2)
            )
            fits = largest_batch(one, two, int(size) - CONTEXT_GB / 0.9)
            assert f"{fits:,}" == said, (name, size, precision)


def test_what_others_use_of_a_card_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3e9, 24e9))  # free, and in all
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1e9)  # for this process
    assert available_gb(torch.device("cuda")) == 4


def test_the_largest_batch_is_the_last_that_fits() -> None:
    def parts(sequences: int) -> dict[str, float]:
        return {"weights": 1.0, "activations": 0.5 * sequences}

    assert largest_batch(parts(1), parts(2), available_gb=10.0) == 16  # 1 + 16 / 2 = 0.9 x 10
    assert largest_batch(parts(1), parts(2), available_gb=1.0) == 0


def test_a_token_costs_six_operations_a_weight_and_its_attention() -> None:
    """43M: 161 million for the matrices, whose embedding only looks up, and attention."""
    config = ModelConfig(vocab_size=97, tied=True)
    model = Transformer(config)
    products = model.n_parameters() - sum(w.numel() for w in model.parameters() if w.dim() < 2)
    assert flops_per_token(model) == 6 * products + 6 * 12 * 256 * 512
    assert flops_per_token(Transformer(ModelConfig(vocab_size=97))) == flops_per_token(model)


def test_a_peak_is_stated_or_measured() -> None:
    assert tabulated_peak("NVIDIA GeForce RTX 3090", "bfloat16") == 71e12
    assert tabulated_peak("NVIDIA H100 80GB HBM3", "float16") == 989e12
    assert tabulated_peak("NVIDIA L40S", "float32") == 91.6e12
    assert tabulated_peak("Some other card", "float32") == 0
    others = {"RTX 3060 Ti": 32.4, "RTX 3090 Ti": 80, "RTX 3080 Ti": 68, "NVIDIA L40": 181,
              "NVIDIA H100 NVL": 835, "NVIDIA A100-PCIE-40GB": 312}  # fmt: skip
    assert {name: tabulated_peak(name, "float16") / 1e12 for name in others} == others
    unknown = ("NVIDIA T400", "NVIDIA T4G", "NVIDIA T1000 8GB", "RTX 3080 Laptop GPU", "RTX 4090 D",
               "RTX 2080 SUPER", "NVIDIA A10")  # fmt: skip
    assert not any(tabulated_peak(name, "float16") for name in unknown)
    rng = torch.get_rng_state()
    peak, how = peak_flops(CPU, "float32")
    assert how == "measured" and 1e8 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), rng)  # it is part of a checkpoint
    assert measured_peak(CPU, "float32") == pytest.approx(peak, rel=3)
    model = Transformer(small_config())
    assert 0 < mfu_per_rate(model, World(0, 2, CPU), "float32") < 1


def test_every_model_config_can_be_estimated() -> None:
    for path in (REPO / "configs/model").glob("*.yaml"):
        config = ModelConfig(vocab_size=6000, **yaml.safe_load(path.read_text("utf-8")))
        assert all(size > 0 for size in memory_by_part(config, 1, 1, "float32").values())
