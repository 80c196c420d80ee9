"""Which format a card gets, and that float16 skips a step whose gradient overflows."""

import math

import pytest
import torch

from babyllama.device import (
    DeviceConfig,
    Scaler,
    checked_precision,
    kernels_missing,
    memory_gb,
    open_scaler,
    pick_device,
    safe_precision,
    set_deterministic,
)
from babyllama.errors import ConfigError

CARDS = [
    ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "float32"),
    ("NVIDIA GeForce GTX 1650", (7, 5), "float32"),
    ("NVIDIA GeForce GTX 1660 Ti", (7, 5), "float32"),
    ("NVIDIA GeForce MX450", (7, 5), "float32"),
    ("NVIDIA GeForce RTX 2080", (7, 5), "float16"),
    ("Tesla T4", (7, 5), "float16"),
    ("Tesla V100-SXM2-16GB", (7, 0), "float16"),
    ("NVIDIA T400 4GB", (7, 5), "float32"),
    ("NVIDIA T550 Laptop GPU", (7, 5), "float32"),
    ("Quadro T1000", (7, 5), "float32"),
    ("Quadro T2000", (7, 5), "float32"),
    ("Quadro RTX 4000", (7, 5), "float16"),
    ("NVIDIA GeForce RTX 3090", (8, 6), "bfloat16"),
    ("NVIDIA GeForce RTX 4060 Laptop GPU", (8, 9), "bfloat16"),
    ("NVIDIA GeForce RTX 5090", (12, 0), "bfloat16"),
    ("NVIDIA A100-SXM4-40GB", (8, 0), "bfloat16"),
    ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16"),
]


@pytest.mark.parametrize("card, capability, wanted", CARDS)
def test_a_card_gets_the_fastest_format_that_trains(card, capability, wanted):
    assert safe_precision("cuda", card, capability) == wanted


@pytest.mark.parametrize(
    "device, wanted", [("cpu", "float32"), ("cpu-bf16", "bfloat16"), ("mps", "float32")]
)
def test_other_devices_compute_in_float32_unless_they_have_bfloat16(device, wanted):
    assert safe_precision(device) == wanted


def test_a_named_format_is_used_and_auto_is_a_safe_one():
    cpu = torch.device("cpu")
    assert open_scaler(cpu, DeviceConfig(precision="float16")).precision == "float16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    assert open_scaler(cpu, DeviceConfig()).precision == ("bfloat16" if has_bf16 else "float32")
    assert open_scaler(torch.device("mps"), DeviceConfig()).precision == "float32"


@pytest.mark.parametrize(
    "device, card, capability, wanted, gets, warns",
    [
        ("cuda", "NVIDIA GeForce GTX 1660 Ti", (7, 5), "float16", "float32", True),
        ("cuda", "NVIDIA GeForce GTX 1080 Ti", (6, 1), "float16", "float32", True),
        ("cuda", "NVIDIA GeForce RTX 2080", (7, 5), "float16", "float16", False),
        ("cuda", "NVIDIA GeForce RTX 2080", (7, 5), "bfloat16", "float32", True),
        ("cuda", "NVIDIA GeForce RTX 3090", (8, 6), "float16", "float16", False),
        ("cuda", "NVIDIA GeForce GTX 1660 Ti", (7, 5), "auto", "float32", False),
        ("cpu", "", (0, 0), "bfloat16", "float32", True),
        ("cpu-bf16", "", (0, 0), "bfloat16", "bfloat16", False),
        ("mps", "", (0, 0), "float16", "float16", False),
    ],
)
def test_a_format_known_to_fail_is_replaced_with_a_warning(
    device, card, capability, wanted, gets, warns
):
    found, warning = checked_precision(device, card, capability, wanted)
    assert found == gets and bool(warning) == warns
    if warns:
        assert wanted in warning and card in warning


def test_the_scale_of_float16_doubles_after_many_good_steps():
    scaler = Scaler(torch.device("cpu"), "float16")
    scaler.load({"scale": 1024.0, "good_steps": scaler.EVERY - 1})
    one_step(scaler, 0.01)
    assert scaler.state() == {"scale": 2048.0, "good_steps": 0}


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu") == torch.device("cpu")
    for name, is_there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        if is_there:
            assert pick_device(name).type == name
        else:
            with pytest.raises(ConfigError, match=f"{name}.*not available"):
                pick_device(name)
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


KERNELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of a build with CUDA 13


@pytest.mark.parametrize(
    "capability, runs",
    [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 6), True), ((8, 9), True),
     ((9, 0), True), ((10, 3), True), ((11, 0), False)],
)  # fmt: skip
def test_a_card_without_kernels_is_told_so(capability, runs, monkeypatch):
    fault = kernels_missing("A card", capability, KERNELS)
    assert bool(fault) != runs and not kernels_missing("A card", (11, 0), [*KERNELS, "compute_100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KERNELS)
    if runs:
        assert pick_device().type == pick_device("cuda").type == "cuda"
        return
    with pytest.raises(
        ConfigError, match=r"kernels for A card \(sm_\d+\), found one for sm_75 .*--d"
    ):
        pick_device("cuda")
    with pytest.warns(RuntimeWarning, match="cu126.*; computing on the processor"):
        assert pick_device().type != "cuda"


def test_deterministic_kernels_want_what_cublas_reads(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="start with CUBLAS_WORKSPACE_CONFIG=:4096:8 python"):
        set_deterministic(card, True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for device, wanted in ((card, True), (torch.device("cpu"), True), (card, False)):
        set_deterministic(device, wanted)
        assert torch.are_deterministic_algorithms_enabled() == (wanted and device == card)


def one_step(scaler: Scaler, factor: float) -> tuple[float, bool]:
    """The norm of one step, and whether it changed the weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.clone()
    with scaler.autocast():
        loss = model(torch.ones(2, 4)).float().sum() * factor
    scaler.backward(loss)
    norm = scaler.step(optimizer, list(model.parameters()), 1.0, loss.item())
    assert all(weight.grad is None for weight in model.parameters())
    return norm, not torch.equal(before, model.weight)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_is_made_in_every_format_and_a_bad_one_is_not(precision):
    scaler = Scaler(torch.device("cpu"), precision)
    norm, changed = one_step(scaler, 0.01)
    assert changed and norm == pytest.approx(0.01 * math.sqrt(16 * 4 + 4 * 4), rel=1e-2)
    for factor in (math.inf, math.nan):
        norm, changed = one_step(scaler, factor)
        assert not changed and not math.isfinite(norm)
    assert one_step(scaler, 0.01)[1]


def test_a_long_gradient_is_cut_to_the_longest_and_a_short_one_is_left():
    for most, moves in ((1.0, 1.0), (5.0, 5.0), (1e3, 10.0)):
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = Scaler(torch.device("cpu"), "float32")
        scaler.backward((weight * torch.full((4,), 5.0)).sum())  # a gradient of length 10
        assert scaler.step(optimizer, [weight], most) == pytest.approx(10.0)  # before it is cut
        assert weight.detach().norm().item() == pytest.approx(moves, rel=1e-5)


def test_an_overflow_halves_the_scale_of_float16_which_survives_a_restart():
    scaler = Scaler(torch.device("cpu"), "float16")
    one_step(scaler, math.inf)
    state = scaler.state()
    assert state["scale"] == 2.0**16 / 2
    again = Scaler(torch.device("cpu"), "float16")
    again.load(state)
    assert again.state() == state


@pytest.mark.parametrize("saved, now", [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_go_on_in_another_format(saved, now):
    state = Scaler(torch.device("cpu"), saved).state()
    scaler = Scaler(torch.device("cpu"), now)
    scaler.load(state)
    assert one_step(scaler, 0.01)[1]


def test_memory_is_that_of_this_process():
    assert 0.05 < memory_gb(torch.device("cpu")) < 64
