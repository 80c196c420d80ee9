"""What is served: models by the names that requests use, each with its engine.

A checkpoint of vqa.train takes pictures and is served alone; any other may have adapters, each of
which is a model of its own.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from babyllama import lora
from babyllama.checkpoint import Loaded, load_adapter, load_model
from babyllama.config import from_repo, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.device import pick_device
from babyllama.errors import ConfigError
from babyllama.run_dir import kind_of
from serve.engine import Engine

if TYPE_CHECKING:
    from serve.pictures import Eyes
    from serve.server import ServerConfig


@dataclass(frozen=True)
class Served:
    """Models by name, the base first.

    eyes: of a model that takes pictures
    """

    engines: dict[str, Engine]
    paths: dict[str, Path]
    eyes: "Eyes | None" = None

    @property
    def created(self) -> dict[str, int]:
        """When each checkpoint was made, in seconds since 1970."""
        return {name: int(path.stat().st_mtime) for name, path in self.paths.items()}


def serve_from(cfg: "ServerConfig", path: Path) -> Served:
    """Load a checkpoint as the settings say; errors as load_model.

    raises: ConfigError if something is asked for that such a model does not have
    """
    device = pick_device(cfg.device)
    if kind_of(path) == "vqa":
        return _with_eyes(cfg, path, device)
    models = _with_adapters(load_model(path, device), cfg.adapters)
    engines = {
        name: Engine(
            make_decoder(loaded.model, cfg.weights), loaded.tokenizer, cfg.slots,
            cfg.prefix_mb / len(models), clock=time.monotonic,
        )
        for name, loaded in models.items()
    }  # fmt: skip
    return Served(engines, {name: loaded.path for name, loaded in models.items()})


def _with_eyes(cfg: "ServerConfig", path: Path, device: str | torch.device) -> Served:
    # Of all that is served, only this needs the folder vqa/.
    from serve.pictures import Eyes, PictureEngine
    from vqa.model import load

    if cfg.adapters or cfg.weights == "int8":
        asked = "--adapters" if cfg.adapters else "--weights int8"
        raise ConfigError(
            f"{asked}: {shown(path)} answers about pictures, which it does with its own weights "
            f"in float32 alone; leave {asked} out"
        )
    loaded = load(path, device)
    loaded.tokenizer.require_dialogue()
    name = name_of(loaded.path)
    return Served({name: PictureEngine(loaded, cfg.slots)}, {name: loaded.path}, Eyes(loaded))


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
