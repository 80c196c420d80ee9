"""Chinese-LLaVA: CC3M-Pretrain-595K and Instruct-150K, translated; rows only, pictures elsewhere.

    {"id": "GCC_train_000644518", "image": "GCC_train_000644518.jpg",
     "conversations": [{"from": "human", "value": "描述图像。\\n<image>"}, {"from": "gpt", …}]}

"<image>" stands before or after the first question. Pictures: images.zip of
liuhaotian/LLaVA-CC3M-Pretrain-595K, unpacked flat; COCO train2017 or train2014, whose other prefix
python -m vqa.pack tries too. The English chat.json beside the translation is left out.
"""

from collections.abc import Iterator
from pathlib import Path

from data_process.datasets.vqa import about_picture, row_files
from data_process.raw import Skip, records
from data_process.registry import Source

KIND = "vqa"
SOURCE = Source(
    home="https://huggingface.co/datasets/LinkSoul/Chinese-LLaVA-Vision-Instructions",
    rows="595 k and 157,712",
    size="196 MB and 185 MB, pictures apart",
    huggingface="LinkSoul/Chinese-LLaVA-Vision-Instructions",
    files=("*chat-translated.json", "*translated/llava_instruct_150k.json"),
)
LICENSE = "Apache-2.0 by its tag; LLaVA-Instruct is CC BY-NC 4.0, CC3M has its own terms"


def read_dir(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One dialogue a row."""
    parts = [part for part in row_files(raw_dir) if part.path.name != "chat.json"]
    for record in records(parts, encoding):
        yield record if isinstance(record, Skip) else about_picture(record)
