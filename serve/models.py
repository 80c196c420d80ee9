"""Served models, by the names that requests use, each with its engine.

A checkpoint of vqa.train takes images and is served alone; any other may have adapters, each of
which is a model of its own.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from babyllama import lora
from babyllama.chat.session import named, tasks_of
from babyllama.checkpoint import load_adapter, load_model
from babyllama.config import shown
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Weights
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, require
from babyllama.retrieval.retriever import API_URL
from babyllama.run_dir import find_checkpoint, read_info
from serve.engine import Engine
from serve.vision import Eyes, ImageEngine, image_tools

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PREFIX_MB = 256  # for beginnings of prompts, so that a shared 资料 is read once


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server: models, clients, limits.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        lora: adapters on the checkpoint, NAME=DIRECTORY each, to be given several times; each is
            served as a model of its own; without a checkpoint they bring their base
        host: address to listen on; any but this machine's own needs a key
        port: 0 takes a free one
        api_key_file: text file whose first line is the key that requests must bear
        allow_origin: web site whose pages may use the server from a browser, as
            https://chat.example.org; to be given several times; "*" for all
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only
        slots: replies that are written at the same time
        queue: replies that may wait beyond those; more are refused with 429
        per_client: of all these, the most of one address
        reply_seconds: a reply that takes longer, waiting included, ends where it is
        body_seconds: the head of a request, and then its body, must arrive within this time
        shutdown_seconds: running replies get this time when the server is stopped
        truncate: leave out the oldest turns of a dialogue that is too long, unless a request says
            otherwise
        index: directory of an index for `retrieve` and the page's look-up; if absent the one that
            data_process.run wiki --index makes, where it is there
        wiki_url: MediaWiki's API that the page's look-up asks where the index knows nothing; ""
            keeps the server off the network
    """

    checkpoint: Path | None = None
    lora: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_origin: tuple[str, ...] = ()
    device: Device = "auto"
    weights: Weights = "auto"
    slots: int = 16
    queue: int = 32
    per_client: int = 16
    reply_seconds: float = 60
    body_seconds: float = 10
    shutdown_seconds: int = 60
    truncate: bool = False
    index: Path | None = None
    wiki_url: str = API_URL

    def __post_init__(self) -> None:
        site = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
        require("server", self, {
            "port": ("0 to 65535", 0 <= self.port <= 65535),
            "slots": ("1 or more", self.slots >= 1),
            "queue": ("0 or more", self.queue >= 0),
            "per_client": ("1 or more", self.per_client >= 1),
            "reply_seconds": ("0.1 or more", self.reply_seconds >= 0.1),
            "body_seconds": ("0.1 or more", self.body_seconds >= 0.1),
            "shutdown_seconds": ("0 or more", self.shutdown_seconds >= 0),
            "allow_origin": (
                "a site as browsers name it, with scheme and without a path, https://example.org",
                all(map(site.fullmatch, self.allow_origin)),
            ),
        })  # fmt: skip

    @property
    def is_local(self) -> bool:
        """True if this machine alone can call."""
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Model:
    """One model to choose.

    stated: the checkpoint whose model.yaml holds for it: an adapter that has none is as its base
    eyes: of a model that takes images
    """

    name: str
    engine: Engine
    path: Path
    stated: Path
    eyes: Eyes | None = None

    def facts(self) -> dict:
        """In OpenAI's form, with what a client may want to know beside it."""
        return {
            "id": self.name, "object": "model", "created": int(self.path.stat().st_mtime),
            "owned_by": "babyllama", "context": self.engine.context,
            "pictures": self.eyes is not None, "tasks": tasks_of(self.stated),
        }  # fmt: skip


def serve_from(cfg: ServerConfig, path: Path) -> dict[str, Model]:
    """A checkpoint and its adapters by name, the base first; errors as load_model.

    raises: ConfigError if something is asked for that such a model does not have
    """
    device = pick_device(cfg.device)
    if read_info(find_checkpoint(path))["kind"] == "vqa":
        return _with_eyes(cfg, path, device)
    base = load_model(path, device)
    base.tokenizer.require_dialogue()
    places = {name_of(base.path): base.path}
    for name, place in map(named, cfg.lora):
        if name in places:
            raise ConfigError(f"two models are called {name!r}; name them: --lora NAME=DIRECTORY")
        places[name] = place
    models: dict[str, Model] = {}
    for name, place in places.items():
        net = base.model
        if models:
            net = lora.bake(load_adapter(copy.deepcopy(net), place)).eval()
        decoder = make_decoder(net, cfg.weights)
        engine = Engine(decoder, base.tokenizer, cfg.slots, PREFIX_MB / len(places))
        stated = place if (place / "model.yaml").is_file() else base.path
        models[name] = Model(name, engine, place, stated)
    return models


def _with_eyes(cfg: ServerConfig, path: Path, device: str | torch.device) -> dict[str, Model]:
    if cfg.lora or cfg.weights == "int8":
        asked = "--lora" if cfg.lora else "--weights int8"
        raise ConfigError(
            f"{asked}: {shown(path)} answers about images, which it does with its own weights "
            f"in float32 alone; leave {asked} out"
        )
    *_, vqa_model = image_tools()
    loaded = vqa_model.load(path, device)
    loaded.tokenizer.require_dialogue()
    name, place = name_of(loaded.path), loaded.path
    return {name: Model(name, ImageEngine(loaded, cfg.slots), place, place, Eyes(loaded))}


def name_of(path: Path) -> str:
    """The run's name of a run or one of its steps."""
    path = path.resolve()
    return path.parent.name if path.name.startswith("step-") or path.name == "best" else path.name
