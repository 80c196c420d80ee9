"""What `--dry-run` computes: parts that add up, memory that grows with what is kept, MFU."""

import pytest
import torch
from conftest import small_config

from babyllama.cli import REPO
from babyllama.estimate import largest_batch, memory_by_part, parameters_by_part
from babyllama.parallel import World
from babyllama.speed import (
    flops_per_token,
    measured_peak,
    mfu_per_rate,
    peak_flops,
    tabulated_peak,
)
from model import SLICE, ModelConfig, Transformer

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
    assert memory(precision="bfloat16")["activations"] == pytest.approx(plain["activations"] / 2)
    assert memory(recompute=True)["activations"] < plain["activations"]
    assert memory(shares=4)["optimizer"] == pytest.approx(plain["optimizer"] / 4)
    assert plain["loss slice"] == pytest.approx((SLICE * 97 * 8 + 4 * 97 * 32) / 1e9)


def test_the_activations_of_a_layer_are_about_those_that_autograd_keeps() -> None:
    config = ModelConfig(
        dim=64, n_layers=4, n_heads=4, multiple_of=64, vocab_size=8, max_seq_len=64
    )
    model, kept = Transformer(config), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(8, 64, dtype=torch.int64))
    found = sum(kept.values()) / 1e9
    wanted = memory_by_part(config, 0, 8, "float32")["activations"]
    assert hidden.requires_grad and wanted == pytest.approx(found, rel=0.35)


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
    rng = torch.get_rng_state()
    peak, how = peak_flops(CPU, "float32")
    assert how == "measured" and 1e8 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), rng)  # it is part of a checkpoint
    assert measured_peak(CPU, "float32") == pytest.approx(peak, rel=3)
    model = Transformer(small_config())
    assert 0 < mfu_per_rate(model, World(0, 2, CPU), "float32") < 1


def test_every_model_config_can_be_estimated() -> None:
    import yaml

    for path in (REPO / "configs/model").glob("*.yaml"):
        config = ModelConfig(vocab_size=6000, **yaml.safe_load(path.read_text("utf-8")))
        assert all(size > 0 for size in memory_by_part(config, 1, 1, "float32").values())
