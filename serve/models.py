"""Served models, by the names that requests use, each with its engine.

A checkpoint of vqa.train takes images and is served alone; any other may have adapters, each of
which is a model of its own.
"""

import copy
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from babyllama import lora
from babyllama.checkpoint import Loaded, load_adapter, load_model
from babyllama.config import from_repo, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Weights
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError
from babyllama.retrieval.retriever import API_URL
from babyllama.run_dir import find_checkpoint, read_info, tasks_of
from serve.engine import Engine
from serve.pictures import Eyes, PictureEngine, picture_tools


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server: models, clients, limits.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        adapters: LoRA runs or adapters of that checkpoint, one or [a, b]; each is served as a model
            of its own
        host: address to listen on; any but this machine's own needs a key
        port: 0 takes a free one
        api_key_file: text file whose first line is the key that requests must bear
        allow_origin: web sites whose pages may use the server from a browser, one or [a, b], as
            https://chat.example.org; "*" for all
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only
        slots: replies that are written at the same time
        queue: replies that may wait beyond those; more are refused with 429
        per_client: of all these, the most of one address
        reply_seconds: a reply that takes longer, waiting included, ends where it is
        body_seconds: the head of a request, and then its body, must arrive within this time
        shutdown_seconds: running replies get this time when the server is stopped
        prefix_mb: memory for beginnings of prompts, so that a shared 资料 is read once
        truncate: leave out the oldest turns of a dialogue that is too long, unless a request says
            otherwise
        index: directory of an index for `retrieve` and the page's look-up; if absent the one that
            data_process.run wiki --index makes, where it is there
        wiki_url: MediaWiki's API that the page's look-up asks where the index knows nothing; ""
            keeps the server off the network
    """

    checkpoint: Path | None = None
    adapters: tuple[Path, ...] | Path = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_origin: tuple[str, ...] | str = ()
    device: Device = "auto"
    weights: Weights = "auto"
    slots: int = 16
    queue: int = 32
    per_client: int = 16
    reply_seconds: float = 60
    body_seconds: float = 10
    shutdown_seconds: int = 60
    prefix_mb: float = 256
    truncate: bool = False
    index: Path | None = None
    wiki_url: str = API_URL

    def __post_init__(self) -> None:
        least = {"port": 0, "slots": 1, "queue": 0, "per_client": 1, "prefix_mb": 0,
                 "reply_seconds": 0.1, "body_seconds": 0.1, "shutdown_seconds": 0}  # fmt: skip
        faults = [
            f"--{name} {getattr(self, name)} (at least {bound})"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if faults or self.port > 65535:
            raise ConfigError(f"cannot serve with {', '.join(faults) or f'port {self.port}'}")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(
                    f"--allow-origin {origin!r}: wanted a site as browsers name it, with scheme "
                    f"and without a path: https://chat.example.org"
                )

    @property
    def origins(self) -> tuple[str, ...]:
        return (self.allow_origin,) if isinstance(self.allow_origin, str) else self.allow_origin


@dataclass(frozen=True)
class Served:
    """Models by name, the base first.

    tasks: what each was trained for; an adapter that does not say is for what its base is
    eyes: of a model that takes images
    """

    engines: Mapping[str, Engine]
    paths: dict[str, Path]
    tasks: Mapping[str, tuple[str, ...]]
    eyes: Eyes | None = None

    @property
    def created(self) -> dict[str, int]:
        """When each checkpoint was made, in seconds since 1970."""
        return {name: int(path.stat().st_mtime) for name, path in self.paths.items()}


def serve_from(cfg: ServerConfig, path: Path) -> Served:
    """Load a checkpoint as the settings say; errors as load_model.

    raises: ConfigError if something is asked for that such a model does not have
    """
    device = pick_device(cfg.device)
    if read_info(find_checkpoint(path))["kind"] == "vqa":
        return _with_eyes(cfg, path, device)
    models = _with_adapters(load_model(path, device), cfg.adapters)
    engines = {
        name: Engine(
            make_decoder(loaded.model, cfg.weights), loaded.tokenizer, cfg.slots,
            cfg.prefix_mb / len(models), clock=time.monotonic,
        )
        for name, loaded in models.items()
    }  # fmt: skip
    paths = {name: loaded.path for name, loaded in models.items()}
    first = next(iter(paths.values()))
    tasks = {
        name: tasks_of(place if (place / "model.yaml").is_file() else first)
        for name, place in paths.items()
    }
    return Served(engines, paths, tasks)


def _with_eyes(cfg: ServerConfig, path: Path, device: str | torch.device) -> Served:
    if cfg.adapters or cfg.weights == "int8":
        asked = "--adapters" if cfg.adapters else "--weights int8"
        raise ConfigError(
            f"{asked}: {shown(path)} answers about images, which it does with its own weights "
            f"in float32 alone; leave {asked} out"
        )
    loaded = picture_tools().load(path, device)
    loaded.tokenizer.require_dialogue()
    name = name_of(loaded.path)
    engines, tasks = {name: PictureEngine(loaded, cfg.slots)}, {name: ("chat",)}
    return Served(engines, {name: loaded.path}, tasks, Eyes(loaded))


def _with_adapters(base: Loaded, adapters: tuple[Path, ...] | Path) -> dict[str, Loaded]:
    """The model, and it once more with each adapter in its weights."""
    base.tokenizer.require_dialogue()
    models = {name_of(base.path): base}
    for path in (adapters,) if isinstance(adapters, Path) else adapters:
        path = from_repo(path)
        model = lora.bake(load_adapter(copy.deepcopy(base.model), path))
        name = name_of(path)
        if name in models:
            raise ConfigError(f"two models are called {name!r}; rename a directory")
        models[name] = Loaded(model.eval(), base.tokenizer, base.step, path, base.kind)
    return models


def name_of(path: Path) -> str:
    """The run's name of a run or one of its steps."""
    path = path.resolve()
    return path.parent.name if path.name.startswith("step-") or path.name == "best" else path.name
