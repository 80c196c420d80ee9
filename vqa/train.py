"""Train a language model to answer questions about images.

    python -m vqa.train --config configs/vqa/splice.yaml
    python -m vqa.train --config configs/vqa/cross.yaml --train.max_steps 500
    python -m vqa.train --config configs/vqa/llava_all.yaml     a second stage: all parts learn

base is a run of pretrain.py or sft.py, a run of this script (its encoder and fusion stay), or null
for a new language model. What `freeze` names keeps its weights, so a first stage with freeze
[encoder, language] trains the connector alone. The loop, checkpoints and Ctrl-C are pretrain.py's.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from babyllama.analysis.watch import WATCH
from babyllama.checkpoint import load_model, read_checkpoint
from babyllama.config import from_repo, parse, run
from babyllama.device import pick_device
from babyllama.distributed import start
from babyllama.errors import ConfigError
from babyllama.optim import OptimConfig
from babyllama.run_dir import find_checkpoint, open_run
from babyllama.trainer import RunConfig, TrainConfig, train
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from vqa.data import Room, VqaDataConfig, features_of, open_images, open_vqa_data
from vqa.encoders import EncoderConfig, make_encoder
from vqa.model import PARTS, FusionConfig, VqaModel, load


@dataclass(frozen=True, kw_only=True)
class VqaConfig(RunConfig):
    """Settings of a run about images.

    Args:
        name: the run's directory, out/<name>
        base: run or checkpoint to start from; null: a new language model
        tokenizer: of a new language model
        model: shape of a new language model
        encoder: what sees
        fusion: how the language model gets it
        freeze: beginnings of the names of parameters that do not train
        rates: shares of optim.lr by beginnings of names, such as {"language.": 0.1}
        data: what is trained on
        train: the loop; a batch is a number of dialogues
    """

    name: str | None = None
    tokenizer: Path = Path("data/tokenizers/sample.model")
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    freeze: tuple[str, ...] = ("encoder",)
    rates: dict[str, float] = field(default_factory=dict)
    data: VqaDataConfig = field(default_factory=VqaDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, warmup_steps=50))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5.0))

    def __post_init__(self) -> None:
        bad = []
        if self.optim.name != "adamw":
            bad.append(f"optim.name wants adamw here, found {self.optim.name}")
        if self.train.samples:
            bad.append("train.samples are texts; vqa.evaluate shows answers about images")
        if min(self.rates.values(), default=0) < 0:
            bad.append(f"rates wants numbers of 0 or more, found {self.rates}")
        unknown = [b for b in self.rates if not b.startswith(PARTS)]
        if unknown:
            bad.append(f"rates {unknown}: names begin {', '.join(PARTS)}")
        if self.data.cache_features and "encoder" not in self.freeze:
            bad.append("data.cache_features wants a frozen encoder; put encoder into freeze")
        if bad:
            raise ConfigError("; ".join(bad))


def build(cfg: VqaConfig) -> tuple[VqaModel, Tokenizer]:
    """The model before training, on the CPU."""
    if cfg.base is not None:
        base = find_checkpoint(from_repo(cfg.base))
        if read_checkpoint(base)[0]["kind"] == "vqa":
            loaded = load(base)
            _require_same(cfg, loaded.model)
            return loaded.model, loaded.tokenizer
        found = load_model(base)
        language, tokenizer = found.model, found.tokenizer
    else:
        tokenizer = Tokenizer(from_repo(cfg.tokenizer))
        torch.manual_seed(cfg.train.seed)
        language = Transformer(replace(cfg.model, vocab_size=tokenizer.vocab_size))
    encoder = make_encoder(cfg.encoder, cfg.train.seed)
    torch.manual_seed(cfg.train.seed)
    return VqaModel(language, encoder, cfg.fusion), tokenizer


def _require_same(cfg: VqaConfig, model: VqaModel) -> None:
    """Refuse settings that a base of this kind would not follow."""
    pairs = {
        "encoder": (cfg.encoder, model.encoder.config, EncoderConfig()),
        "fusion": (cfg.fusion, model.fusion, FusionConfig()),
    }
    for name, (wanted, found, default) in pairs.items():
        if wanted not in (found, default):
            raise ConfigError(
                f"{name}: wanted {wanted}, found {found} in the base, which keeps its own; leave "
                f"the section out, or start from a language model"
            )


def main(cfg: VqaConfig) -> int:
    """Train; returns the exit code."""
    if not cfg.name:
        raise ConfigError("the run has no name: give --name, or a config that has one")
    model, tokenizer = build(cfg)
    model.freeze(cfg.freeze).rates = dict(cfg.rates)
    packed = open_images(cfg.data)
    with start(pick_device(cfg.device.device), cfg.parallel) as world:
        model = model.to(world.device)
        if world.device.type == "cuda":
            from babyllama.cuda.attention import on_card  # takes its time, for cards alone

            on_card(model.language, cfg.train.blocks)
        features = None
        if cfg.data.cache_features:

            def seen() -> list:
                return [features_of(model.encoder, held, world.device) for held in packed]

            world.on_main(seen)  # computes those that are not there
            features = seen()
        room = Room(model.config.max_seq_len, tokenizer.pad_id, model.n_positions)
        data = open_vqa_data(
            cfg.data, tokenizer, room, cfg.train, packed, model.encoder.config, features
        )
        with open_run(cfg.name, cfg, world) as directory:
            return train(model, data, tokenizer, cfg, world, directory, "vqa", watch=WATCH)


if __name__ == "__main__":
    run(main, parse(VqaConfig, __doc__))
