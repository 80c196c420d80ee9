"""Talk about a picture in the terminal.

    python -m vqa.chat out/vqa-splice --image photo.jpg
    python -m vqa.chat out/vqa-splice --image photo.jpg --ask 图片里是什么？

/image FILE looks at another picture and begins anew, an empty line or Ctrl-D ends.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from babyllama.cli import from_repo, parse, run
from babyllama.device import pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.sampling import SamplingConfig
from vqa.answer import look, stream_answer
from vqa.model import load


@dataclass(frozen=True)
class ChatConfig:
    """Settings of a talk.

    Args:
        checkpoint: a run or a checkpoint of python -m vqa.train
        image: the picture
        ask: one question, answered without a talk
        sampling: how answers are drawn
        device: where to compute; auto: the fastest there is
    """

    checkpoint: Path | None = None
    image: Path | None = None
    ask: str | None = None
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=64)
    )
    device: str = "auto"


def main(cfg: ChatConfig) -> None:
    """Answer until the user has enough."""
    if cfg.checkpoint is None:
        raise ConfigError("wanted a checkpoint: python -m vqa.chat out/NAME --image FILE")
    loaded = load(from_repo(cfg.checkpoint), pick_device(cfg.device))
    seen = look(loaded, [cfg.image.expanduser()] if cfg.image else [])
    messages: list[dict] = []
    while True:
        try:
            question = cfg.ask or input("人类：").strip()
        except EOFError:
            return
        if not question:
            return
        if question.startswith("/image"):
            try:
                name = question.removeprefix("/image").strip()
                seen, messages = look(loaded, [Path(name).expanduser()]), []
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": question})
        text = ""
        print("助手：", end="", flush=True)
        for part in stream_answer(loaded, seen, messages, cfg.sampling):
            text += part
            print(part, end="", flush=True)
        print()
        if cfg.ask:
            return
        messages.append({"role": "assistant", "content": text or "…"})


if __name__ == "__main__":
    run(main, parse(ChatConfig, __doc__, positional=("checkpoint",)))
