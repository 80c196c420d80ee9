"""Images of all kinds, made here: each is decoded as it should look, or refused in one line."""

import base64
import io
import random
import resource
import struct
import zlib

import numpy as np
import pytest
import torch

from babyllama.errors import DataError
from vqa import images

PIL = pytest.importorskip("PIL.Image", reason="pip install -r requirements/vqa.txt")


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30), **draw: object) -> "PIL.Image":
    """Left half red, right half blue, in the given mode."""
    image = PIL.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def stored(image: "PIL.Image", kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def load(data: bytes, size: int) -> torch.Tensor:
    """An image ready for an encoder."""
    return images.normalise(images.squares(images.decode(data, least=size), size))


def colour(image: "PIL.Image", x: int, y: int) -> tuple[int, int, int]:
    return image.getpixel((x, y))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_becomes_the_same_rgb_picture(kind, tmp_path):
    data = stored(picture(), kind)
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    for source in (data, path):
        image = images.decode(source)
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert np.allclose(colour(image, 5, 15), (255, 0, 0), atol=4)
        assert np.allclose(colour(image, 35, 15), (0, 0, 255), atol=4)


def test_cmyk_is_the_colour_it_stands_for():
    image = images.decode(stored(picture("CMYK"), "JPEG", quality=95))
    assert np.allclose(colour(image, 5, 15), (255, 0, 0), atol=12)
    assert np.allclose(colour(image, 35, 15), (0, 0, 255), atol=12)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).repeat(4).reshape(32, 32)
    image = images.decode(stored(PIL.fromarray(ramp)))
    grey = np.asarray(image)[..., 0].astype(int)
    assert abs(grey - ramp.astype(float) / 257).max() <= 0.51
    assert 100 < grey.mean() < 155


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode):
    clear = PIL.new("RGBA", (8, 8), (0, 0, 0, 0))
    if mode == "P":
        data = stored(PIL.new("P", (8, 8), 0), transparency=0)
    else:
        data = stored(clear.convert(mode))
    assert colour(images.decode(data), 4, 4) == (255, 255, 255)


def test_half_transparent_is_mixed_with_white():
    data = stored(PIL.new("RGBA", (4, 4), (255, 0, 0, 128)))
    assert np.allclose(colour(images.decode(data), 1, 1), (255, 127, 127), atol=1)


def test_an_animation_shows_its_first_frame():
    frames = [PIL.new("RGB", (9, 9), c) for c in ("red", "blue", "green")]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(images.decode(data), 4, 4) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation):
    """A corner is red; where a viewer has to show it is fixed by the standard (EXIF 2.3, 4.6.4)."""
    image = PIL.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 8, 8))
    exif = PIL.Exif()
    exif[0x0112] = orientation
    shown = images.decode(stored(image, "JPEG", exif=exif, quality=95))
    assert shown.size == ((32, 16) if orientation < 5 else (16, 32))
    right, bottom = shown.width - 3, shown.height - 3
    corners = {1: (2, 2), 2: (right, 2), 3: (right, bottom), 4: (2, bottom),
               5: (2, 2), 6: (right, 2), 7: (right, bottom), 8: (2, bottom)}  # fmt: skip
    assert np.allclose(colour(shown, *corners[orientation]), (255, 0, 0), atol=20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow looks for the resolution there
def test_damaged_exif_data_do_not_lose_the_picture():
    data = stored(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert images.decode(data).size == (40, 30)


def test_one_pixel_is_a_picture():
    pixels = load(stored(PIL.new("RGB", (1, 1), "red")), 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.allclose(pixels, pixels[:, :, :1, :1].expand_as(pixels))


@pytest.mark.parametrize("data", [b"", b"hello, I am text", b"\x00" * 64, b"%PDF-1.7", b"GIF89a"])
def test_what_is_no_picture_is_refused_in_one_line(data):
    with pytest.raises(DataError, match=r"^mine: wanted an? .*image.*found.*; ") as error:
        images.decode(data, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_that_is_cut_off_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = stored(PIL.fromarray(noise), kind)
    with pytest.raises(DataError, match="cut off or damaged"):
        images.decode(data[: len(data) // 2])


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels that is a thousandth of its pixels long."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    packer = zlib.compressobj(9)
    line = b"\x00" * (1 + 3 * width)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (65_000, 1_200), (1, 200_000_000)])
def test_a_decompression_bomb_is_refused_before_its_pixels_exist(size):
    width = size[0]
    data = bomb(width, 50)
    data = data[:16] + struct.pack(">II", *size) + data[24:]
    data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"at most 50,000,000 pixels.*make the image smaller"):
        images.decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KB


def test_too_many_bytes_are_refused_without_reading_them(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(DataError, match=r"large.png: wanted an image of at most 20 MB"):
        images.decode(path)
    with pytest.raises(DataError, match=r"missing.png: no such image"):
        images.decode(tmp_path / "missing.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on what is damaged
def test_any_damage_gives_a_picture_or_a_data_error():
    whole = {kind: stored(picture(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")}
    chance = random.Random(0)
    n_refused = 0
    for _ in range(400):
        data = bytearray(chance.choice(list(whole.values())))
        for _ in range(chance.randint(1, 12)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert images.decode(bytes(data)).mode == "RGB"
        except DataError:
            n_refused += 1
    assert 40 < n_refused < 400


def test_the_four_quarters_are_the_picture_twice_as_large():
    image = picture(size=(64, 64))
    whole, *quarters = images.squares(image, 32, tiles=2)
    assert len(quarters) == 4 and whole.shape == (3, 32, 32)
    top, bottom = torch.cat(quarters[:2], 2), torch.cat(quarters[2:], 2)
    assert torch.equal(torch.cat((top, bottom), 1), images.squares(image, 64)[0])


def test_pixels_are_normalised_as_the_encoder_was_trained():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    low, high = images.normalise(pixels, images.IMAGENET)[:, :, 0, 0]
    assert torch.allclose(low, torch.tensor([-2.1179, -2.0357, -1.8044]), atol=1e-4)
    assert torch.allclose(high, torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


def test_a_large_jpeg_is_read_smaller_and_looks_the_same():
    data = stored(picture(size=(1600, 1200)), "JPEG")
    assert images.decode(data, least=100).width < 1600
    small, large = load(data, 64), load(stored(images.decode(data)), 64)
    assert (small - large).abs().max() < 0.2


def test_a_jpeg_that_goes_over_itself_thousands_of_times_is_refused():
    data = stored(picture(), "JPEG", progressive=True)
    assert images.decode(data).size == picture().size
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    with pytest.raises(DataError, match=r"at most 100 scans, found \d{4}; save it again"):
        images.decode(data[:-2] + scan * 5000 + data[-2:])


def test_a_data_url_gives_its_bytes_and_nothing_is_fetched():
    data = stored(picture())
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert images.from_data_url(url) == data
    head, _, body = url.partition(",")
    wrapped = "\r\n".join(body[i : i + 7] for i in range(0, len(body), 7))
    for same in (f"{head},{wrapped}\n", f" {head.upper()},{body}", f"{head},\t{body}"):
        assert images.from_data_url(same) == data
    for wrong in ("https://example.com/a.png", "file:///etc/passwd", "data:text/html;base64,AAAA",
                  url[:-3] + "!!!", "data:image/png,AAAA"):  # fmt: skip
        with pytest.raises(DataError, match=r"^image_url: wanted .*; "):
            images.from_data_url(wrong)
    with pytest.raises(DataError, match="at most 20 MB"):
        images.from_data_url("data:image/png;base64," + "A" * (images.MAX_BYTES * 4 // 3 + 8))
