"""What a frozen encoder sees in each picture of a set, computed once and kept on the disk.

    data/pictures/<set>/features-<key>.npy    (pictures, places, sum of widths) float16

The key stands for the encoder's weights and settings and for the set's pictures.
"""

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from babyllama.cli import shown
from babyllama.images import normalise
from vqa.encoder import Encoder
from vqa.loader import prepared
from vqa.pictures import Pictures

BATCH = 16


def key_of(encoder: Encoder, pictures: Pictures) -> str:
    """Another one where weights, settings or pictures are others."""
    digest = hashlib.sha256(repr(replace(encoder.config, weights=None)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in sorted(pictures.place.glob("pictures-*.tar")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def features_of(encoder: Encoder, pictures: Pictures, device: torch.device) -> np.ndarray:
    """The features of all pictures, read from the disk; computed first where they are not there."""
    path = pictures.place / f"features-{key_of(encoder, pictures)}.npy"
    if not path.is_file():
        _compute(encoder, pictures, path, device)
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def _compute(encoder: Encoder, pictures: Pictures, path: Path, device: torch.device) -> None:
    config, encoder = encoder.config, encoder.eval().to(device)
    shape = (len(pictures), config.n_places, sum(encoder.widths))
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
    start = time.perf_counter()
    for first in tqdm(range(0, len(pictures), BATCH), f"see {pictures.place.name}", disable=None):
        part = range(first, min(first + BATCH, len(pictures)))
        squares = torch.stack([prepared(pictures.read(n), pictures.names[n], config)
                               for n in part])  # fmt: skip
        seen = encoder(normalise(squares.to(device), config.normalisation))
        out[part.start : part.stop] = seen.float().cpu().numpy().astype(np.float16)
    out.flush()
    os.replace(temporary, path)
    rate = len(pictures) / (time.perf_counter() - start)
    print(f"{shown(path)}: {len(pictures):,} pictures at {rate:.1f} a second")
