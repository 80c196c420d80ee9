"""minimind-v: the jsonl edition (pictures in zip files) and the parquet edition (pictures inside).

    jsonl     {"conversations": [{"role", "content"}, …], "image": "a.jpg"}    "a.jpg, b.jpg": several
    parquet   conversations = a JSON string of that list, image_bytes = one picture or a list

The picture of a parquet row is called "<file>#<row>", by which python -m vqa.pack finds it. Rows
about several pictures are left out and counted.
"""  # noqa: E501

import json
from collections.abc import Iterator
from pathlib import Path

from babyllama.errors import ConfigError
from data_process.datasets.conversations import refuse
from data_process.datasets.vqa import ROWS, about_picture, row_files
from data_process.raw import Part, Record, Skip, records
from data_process.registry import Source

KIND = "vqa"
SOURCE = Source(
    home="https://huggingface.co/datasets/jingyaogong/minimind-v_dataset",
    rows="595 k and 300 k (jsonl), 1.27 M and 2.9 M (parquet)",
    huggingface="jingyaogong/minimind-v_dataset",
    modelscope="gongjy/minimind-v_dataset",
)
LICENSE = "see the card; built on LLaVA's data, CC BY-NC 4.0"


def read_dir(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One dialogue a row."""
    parts = row_files(raw_dir, (*ROWS, ".parquet"))
    text = [part for part in parts if part.path.suffix != ".parquet"]
    number = 0
    for record in records(text, encoding):
        number += 1
        yield record if isinstance(record, Skip) else about_picture(record)
    for part in (part for part in parts if part.path.suffix == ".parquet"):
        for record in parquet_records(part, raw_dir, number):
            number += 1
            yield record if isinstance(record, Skip) else about_picture(record)


def parquet_records(part: Part, raw_dir: Path, first: int) -> Iterator[Record | Skip]:
    """The rows of a parquet file, without their pictures' bytes.

    raises: ConfigError if pyarrow is missing
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            "wanted pyarrow to read parquet, found it not installed; "
            "pip install -c constraints.txt -r requirements/vqa.txt"
        ) from None
    file = parquet.ParquetFile(part.path)
    root = raw_dir if raw_dir.is_dir() else raw_dir.parent
    name, row = part.path.relative_to(root).as_posix(), 0
    for batch in file.iter_batches(1024, columns=["conversations", "image_bytes"]):
        texts = batch.column("conversations").to_pylist()
        held = batch.column("image_bytes").to_pylist()
        for text, pictures in zip(texts, held, strict=True):
            n_pictures = len(pictures) if isinstance(pictures, list) else int(pictures is not None)
            names = [f"{name}#{row}.{i}" if i else f"{name}#{row}" for i in range(n_pictures)]
            place = f"{part.name}:{row}"
            try:
                data = {"conversations": json.loads(text), "image": names}
                yield Record(first + row, place, None, data)
            except (ValueError, TypeError):
                yield refuse(Record(first + row, place, None, text), "broken_json")
            row += 1
