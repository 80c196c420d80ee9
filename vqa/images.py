"""Images: bytes or a file in, a tensor out, whatever the bytes are.

Owns decoding: what is refused (not an image, cut off, too many pixels or bytes), how an image is
turned upright (EXIF), flattened (alpha on white, CMYK and 16 bits to RGB, the first frame of an
animation) and cut into squares. The header is read before any pixel, so a decompression bomb
costs no memory. What an encoder does with the squares is vqa/'s; the chat page may use this too.
"""

import base64
import binascii
import contextlib
import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from babyllama.config import shown
from babyllama.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 * 2**20
# An image of 48 megapixels takes 144 MB while it is made smaller.
MAX_PIXELS = 50_000_000
MAX_SCANS = 100  # cameras and programs write 1 to 20

# What Pillow's decoders raise on bytes that are wrong.
_BAD = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
        struct.error)  # fmt: skip


class Mean(NamedTuple):
    """What is taken off each colour, of 0 to 1, and what the rest is divided by."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Mean((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def decode(source: bytes | Path, name: str = "", least: int = 0) -> "Image":
    """An upright RGB image, all of its pixels read.

    name: what messages call the image; of a file its path
    least: a JPEG may come smaller, but no side below this
    raises: DataError if it is no image that can be used, with the reason
    """
    name = name or (shown(source) if isinstance(source, Path) else "the image")
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{name}: no such image; wanted a file ({', '.join(FORMATS)})")
    n_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
    if n_bytes > MAX_BYTES:
        raise DataError(
            f"{name}: wanted an image of at most {MAX_BYTES >> 20} MB, found "
            f"{n_bytes / 2**20:.1f} MB; make it smaller"
        )
    data = source.read_bytes() if isinstance(source, Path) else source
    # Each scan of a JPEG goes over all of the image; one with thousands takes minutes.
    if data.startswith(b"\xff\xd8") and (n_scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise DataError(
            f"{name}: wanted a JPEG of at most {MAX_SCANS} scans, found {n_scans}; save it again"
        )
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            if image.width * image.height < 1:
                raise ValueError("it has no pixels")
            if least:
                image.draft(None, (least, least))
            image.load()
            # Turned and mirrored as EXIF says (2.3, section 4.6), where its data are whole.
            with contextlib.suppress(*_BAD):
                ImageOps.exif_transpose(image, in_place=True)
            return _flat(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name}: wanted at most {MAX_PIXELS:,} pixels, found {error}; make the image smaller"
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{name}: wanted an image ({', '.join(FORMATS)}), found {len(data)} bytes that are "
            f"none, they begin {data[:8]!r}; save it as JPEG or PNG"
        ) from None
    except _BAD as error:
        raise DataError(
            f"{name}: wanted a whole image, found it cut off or damaged ({error}); get it again"
        ) from None


def _flat(image: "Image") -> "Image":
    """In RGB; what is transparent shows white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut to 255
        wide = np.asarray(image).astype(np.float64).clip(0, 65535)
        return Image.fromarray((wide / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def squares(image: "Image", size: int, tiles: int = 1) -> Tensor:
    """The image as squares: the whole of it and, with tiles 2, its four quarters larger.

    Every part of the image is kept; one that is no square is stretched.

    returns: (1 or 1 + tiles * tiles, 3, size, size) uint8
    """
    from PIL import Image

    def fitted(side: int) -> Tensor:
        pixels = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, side, side)

    found = [fitted(size)]
    if tiles > 1:
        large = fitted(size * tiles)
        found += [row for part in large.split(size, 1) for row in part.split(size, 2)]
    return torch.stack(found).contiguous()


def normalise(pixels: Tensor, how: Mean = IMAGENET) -> Tensor:
    """uint8 pixels (…, 3, H, W) as the float32 numbers that an encoder was trained on."""
    mean, std = (torch.tensor(part, device=pixels.device).view(3, 1, 1) for part in how)
    return (pixels.float() / 255 - mean) / std


def from_data_url(url: str) -> bytes:
    """The bytes of a "data:image/…;base64,…" address, as chat interfaces send images. White space
    in it, as the base64 command makes, counts for nothing (RFC 2045, 6.8).

    raises: DataError if it is another address, no base64, or too long; nothing is ever fetched
    """
    head, comma, body = url.partition(",")
    head, body = head.strip().lower(), "".join(body.split())
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise DataError(
            f"image_url: wanted data:image/…;base64,…, found {url[:40]!r}; images are not "
            f"fetched from the network: send the bytes"
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise DataError(
            f"image_url: wanted an image of at most {MAX_BYTES >> 20} MB, found about "
            f"{len(body) * 3 / 4 / 2**20:.1f} MB; make it smaller"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"image_url: wanted base64, found {error}; encode it again") from None
