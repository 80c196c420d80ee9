"""Laws of adapters: nothing changes before training, the base never, and each way to compute with
them gives the same; on the disk they find their own base and no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from babyllama import lora
from babyllama.analysis.estimate import adapter_line
from babyllama.checkpoint import load_adapter
from babyllama.distributed import World
from babyllama.errors import CheckpointError, ConfigError
from babyllama.lora import LoraConfig, LoraLinear, apply_lora, bake, stored, switch
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.run_dir import sha256
from conftest import save_adapter, small_config
from model import KVCache, Transformer

LAYERS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
ALL = (*LAYERS, "output")
TOKENS = torch.arange(2, 66).view(2, 32)


def make(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(small_config(n_kv_heads=2, **changes)).eval()


def adapted(
    name: str = "default", on: Transformer | None = None, seed: int = 1, **settings: object
) -> Transformer:
    """A model with an adapter that does something: its b is not zero."""
    cfg = LoraConfig(**{"rank": 4, "targets": ALL} | settings)
    model = apply_lora(on or make(), cfg, name, base="out/base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in stored(model).items():
            if key.endswith(".b"):
                weight.normal_(std=0.05, generator=generator)
    return model


def copies(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapted_model_begins_as_its_base(target, rslora):
    wanted = make()(TOKENS)
    model = apply_lora(make(), LoraConfig(targets=(target,), rslora=rslora))
    assert torch.equal(model(TOKENS), wanted)
    n_adapted = len([path for path, _ in lora.layers(model)])
    assert n_adapted == (1 if target == "output" else 2)


def test_adapters_of_one_seed_begin_alike_and_of_another_do_not():
    one, two, other = (
        stored(apply_lora(make(), LoraConfig(), seed=seed))["layers.0.attention.wq.a"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_only_adapters_train_and_the_base_keeps_every_bit():
    model = apply_lora(make(), LoraConfig(rank=4, targets=ALL))
    before, base = copies(model), lora.fingerprint(model)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    first = float(model(TOKENS, TOKENS).loss_sum.detach())
    for _ in range(5):
        model(TOKENS, TOKENS).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model(TOKENS, TOKENS).loss_sum.detach()) < first
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if ".lora.default." in n}
    assert len(changed) == 2 * (2 * len(LAYERS) + 1)
    assert lora.fingerprint(model) == base == lora.fingerprint(make())
    assert {n for n, w in model.named_parameters() if w.requires_grad} == changed


def slow_logits(model: Transformer, tensors: dict, scale: float) -> torch.Tensor:
    """The base with W + scale B A in place of each W; differentiable in a and b."""
    weights = dict(model.named_parameters())
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == "a":
            added = scale * tensors[f"{layer}.b"] @ tensors[name]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + added
    return torch.func.functional_call(model, weights, (TOKENS,))


@pytest.mark.parametrize("rslora, scale", [(False, 4.0), (True, 8.0)])
def test_loss_and_gradients_are_those_of_the_whole_weights(rslora, scale):
    model = adapted(rslora=rslora)
    mine = stored(model)
    tensors = {name: w.detach().clone().requires_grad_() for name, w in mine.items()}
    logits = slow_logits(make(), tensors, scale)
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=1e-5)
    wanted = F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten(), reduction="sum")
    wanted.backward()
    loss = model(TOKENS, TOKENS).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for name, weight in mine.items():
        torch.testing.assert_close(weight.grad, tensors[name].grad, rtol=1e-3, atol=1e-5)


def test_the_order_of_a_merge_is_fixed_and_near_the_product():
    layer = dict(lora.layers(adapted(rank=16)))["layers.0.feed_forward.w2"].lora["default"]
    torch.testing.assert_close(layer.exact_delta(), layer.delta(), rtol=1e-5, atol=1e-7)
    a, b = (w.detach().double() for w in (layer.a, layer.b))
    added = torch.zeros(len(b), a.shape[1])
    for i in range(16):  # each product and each sum rounded once, in order of the rank
        product = torch.tensor([[float(x * y) for y in a[i]] for x in b[:, i]])
        added = (added.double() + product.double()).float()
    assert torch.equal(layer.exact_delta(), added * layer.scale)


def test_a_baked_model_is_a_plain_one():
    model = adapted()
    wanted, names = model(TOKENS), list(make().state_dict())
    before = model.state_dict()["output.weight"].clone()
    bake(model)
    assert not torch.equal(model.output.weight, before)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == names
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert all(w.requires_grad for w in model.parameters())
    assert not lora.is_adapted(model) and list(stored(model)) == names


def test_several_adapters_share_a_base_and_are_switched_by_name():
    model, plain = make(), make()(TOKENS)
    said = {}
    for seed, (name, targets) in enumerate({"title": ("wq", "w2"), "poem": ("wv",)}.items()):
        adapted(name, model, seed, targets=targets)
        said[name] = model(TOKENS)
    assert not torch.equal(said["title"], said["poem"])
    for name in ("title", "poem", "title"):
        assert torch.equal(switch(model, name)(TOKENS), said[name])
        trained = {n for n, w in model.named_parameters() if w.requires_grad}
        assert trained and all(f".lora.{name}." in n for n in trained)
    assert torch.equal(switch(model, None)(TOKENS), plain)
    assert not any(w.requires_grad for w in model.parameters())
    assert torch.equal(bake(model)(TOKENS), plain)


def test_the_names_of_what_is_stored_depend_on_no_state():
    model, names = adapted("one"), set(make().state_dict())
    wanted = list(stored(model))
    assert wanted[:2] == ["layers.0.attention.wq.a", "layers.0.attention.wq.b"]
    assert list(stored(adapted("other", model))) == wanted
    assert names < set(model.state_dict())
    assert set(stored(switch(model, None))) == names


def test_dropout_works_in_training_alone():
    model = adapted(targets=LAYERS, dropout=0.5)
    wanted = model(TOKENS)
    assert torch.equal(model(TOKENS), wanted)
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    with pytest.raises(ConfigError, match=r"lora\.dropout 0\.1 does not reach output"):
        apply_lora(make(), LoraConfig(targets=("output",), dropout=0.1))


def test_cached_decoding_reads_the_adapters():
    model = adapted()
    wanted = model(TOKENS)
    cache = KVCache(model.config, torch.zeros(2, dtype=torch.int64), 32)
    steps = [model(TOKENS[:, i : i + 1], cache=cache) for i in range(32)]
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=0, atol=1e-5)


def test_weights_read_from_outside_hold_the_active_adapter():
    layer = dict(lora.layers(adapted()))["layers.1.attention.wo"]
    assert isinstance(layer, LoraLinear)
    torch.testing.assert_close(layer.weight, layer.plain().weight, rtol=0, atol=1e-6)
    layer.active = None
    assert layer.weight is layer.plain().weight is layer._parameters["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_trains_float32_adapters(dtype):
    model = adapted()
    wanted = float(model(TOKENS, TOKENS).loss_sum.detach())
    with torch.autocast("cpu", dtype):
        loss = model(TOKENS, TOKENS).loss_sum
    assert float(loss.detach()) == pytest.approx(wanted, rel=2e-2)
    loss.backward()
    for weight in stored(model).values():
        assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()
    half = model.to(dtype)(TOKENS, TOKENS).loss_sum.detach()
    assert float(half) == pytest.approx(wanted, rel=2e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_layer_is_one_graph_and_follows_a_switch():
    model = adapted("one")
    adapted("two", model, seed=5, targets=("wv",))
    wanted = {name: switch(model, name)(TOKENS) for name in ("one", "two")}
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for name, logits in wanted.items():
        torch.testing.assert_close(switch(model, name)(TOKENS), logits, rtol=0, atol=1e-5)


def train_shared(rank: int, size: int, engine: str) -> dict[str, torch.Tensor]:
    """Three updates on this rank's row (both rows where it is alone); the adapter after them."""
    model = apply_lora(make(), LoraConfig(rank=4, targets=ALL)).train()
    wrapped = World(rank, size, torch.device("cpu"), engine).wrap(model)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    rows = TOKENS[rank::size]
    for _ in range(3):
        loss = wrapped(tokens=rows, targets=rows).loss_sum * size / TOKENS.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone()
        for name, w in stored(model).items()
    }


def in_a_process(rank: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    for engine in ("ddp", "fsdp2"):
        weights = train_shared(rank, 2, engine)
        if rank == 0:
            save_file(weights, Path(place) / f"{engine}.safetensors")
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_two_processes_train_the_adapters_of_one(tmp_path):
    wanted = train_shared(0, 1, "ddp")
    torch.multiprocessing.start_processes(
        in_a_process, (str(tmp_path),), nprocs=2, start_method="fork"
    )  # forked, so that torch is not loaded two times more
    for engine in ("ddp", "fsdp2"):
        found = load_file(tmp_path / f"{engine}.safetensors")
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": ("wq", "wx")}, r"\['wx'\] match no linear layer.*wq, wk, wv, wo, w1, w2, w3"),
        ({"targets": ("attention",)}, r"\['attention'\] match no linear layer"),
        ({"targets": ("q",)}, r"\['q'\] match no linear layer"),
        ({"targets": ("layers.2.attention.wq",)}, "match no linear layer"),
        ({"targets": ()}, r"lora\.targets wants at least one name"),
        ({"rank": 0}, r"lora\.rank wants 1 or more, found 0"),
        ({"alpha": float("nan")}, r"lora\.alpha wants a number above 0"),
        ({"dropout": 1.0}, r"lora\.dropout wants 0 to below 1"),
        ({"rank": 0, "alpha": 0.0}, "lora.rank wants .*; lora.alpha wants"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        apply_lora(make(), LoraConfig(**settings))


def test_one_layer_can_be_named_alone():
    model = apply_lora(make(), LoraConfig(targets=("layers.1.attention.wq", "w2")))
    assert [path for path, _ in lora.layers(model)] == [
        "layers.0.feed_forward.w2", "layers.1.attention.wq", "layers.1.feed_forward.w2",
    ]  # fmt: skip
    assert " in 2 x feed_forward.w2, 1 x attention.wq; 2,560 parameters" in adapter_line(model)


def test_a_tied_head_is_refused_as_a_target():
    with pytest.raises(ConfigError, match="output shares its weights with the embedding"):
        apply_lora(make(tied=True), LoraConfig(targets=("output",)))
    model = apply_lora(make(tied=True), LoraConfig(targets=("wq",)))
    assert "output.weight" not in stored(switch(model, None))


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", "标 题"])
def test_a_name_that_cannot_be_used_is_refused(name):
    model = adapted("default")
    with pytest.raises(ConfigError, match=rf"adapter {name!r}: wanted a new name"):
        apply_lora(model, LoraConfig(), name)
    with pytest.raises(ConfigError, match=r"no adapter 'none' on this model; it has \['default'\]"):
        switch(model, "none")


def test_a_saved_adapter_comes_back_and_is_all_that_is_saved(tmp_path):
    model = adapted(rank=3, alpha=5.0, rslora=True, targets=("wk", "output"))
    path = save_adapter(model, tmp_path / "title")
    files = sorted(file.name for file in path.iterdir())
    assert files == ["adapter.safetensors", "adapter.yaml", "checksums.json"]
    again = load_adapter(make(), path, "other")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.lora.configs == {"other": model.lora.configs["default"]}
    assert (
        lora.settings(again)
        == lora.settings(model)
        == yaml.safe_load((path / "adapter.yaml").read_text("utf-8"))
    )
    assert load_file(path / "adapter.safetensors").keys() == stored(model).keys()
    save_adapter(again, path)
    assert torch.equal(load_adapter(make(), path)(TOKENS), model(TOKENS))


def test_an_adapter_goes_on_its_own_base_alone(tmp_path):
    path = save_adapter(adapted(), tmp_path / "title")
    almost = make()
    with torch.no_grad():
        almost.norm.weight[3] += 1e-6
    before = copies(almost)
    with pytest.raises(CheckpointError, match=r"title: its adapter belongs to the base out/base w"):
        load_adapter(almost, path)
    assert before.keys() == almost.state_dict().keys() and not hasattr(almost, "lora")
    second = adapted("one", make())
    assert load_adapter(second, path, "two").lora.active == "two"  # a base with another adapter
    with pytest.raises(CheckpointError, match=r"belongs to the base out/base"):
        load_adapter(bake(second), path)


def seal(path: Path) -> None:
    """Make the checksums anew, as if the files had been written so."""
    sums = {f.name: sha256(f) for f in path.iterdir() if f.name != "checksums.json"}
    (path / "checksums.json").write_text(json.dumps(sums), "utf-8")


def edit_yaml(path: Path, **changes: object) -> None:
    file = path / "adapter.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text("utf-8")) | changes), "utf-8")


def edit_tensors(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path / "adapter.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter.safetensors")


DAMAGES = {
    "no yaml": (lambda p: (p / "adapter.yaml").write_text("]"), "wanted the adapter.yaml"),
    "a list": (lambda p: (p / "adapter.yaml").write_text("[]"), "wanted the adapter.yaml"),
    "rank": (lambda p: edit_yaml(p, rank="x"), "wanted the adapter.yaml of an adapter, found Type"),
    "zero": (lambda p: edit_yaml(p, rank=0), "found ConfigError lora.rank wants 1"),
    "lean": (lambda p: edit_yaml(p, rank=5), r"wq\.a: wanted \(5, 32\), found \(4, 32\)"),
    "base": (lambda p: edit_yaml(p, base=3), "found TypeError fingerprint"),
    "less": (lambda p: edit_tensors(p, lambda t: t.pop("output.a")), r"output\.a: .* found None"),
    "more": (lambda p: edit_tensors(p, lambda t: t.update(x=t["output.a"] + 0)), "x: wanted None"),
    "cut": (lambda p: (p / "adapter.safetensors").write_bytes(b"\0" * 99), "wanted safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_left_alone(tmp_path, kind):
    damage, message = DAMAGES[kind]
    path = save_adapter(adapted(), tmp_path / "title")
    damage(path)
    model = make()
    with pytest.raises(CheckpointError, match=r"title fails its checksum in adapter\."):
        load_adapter(model, path)
    seal(path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, path)
    assert not hasattr(model, "lora")
