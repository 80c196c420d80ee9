"""Documents as {"text": …}: SkyPile, minimind's pretraining files and most others."""

from collections.abc import Iterator
from pathlib import Path

from data_process.raw import Skip, as_row, records

KIND = "text"
SOURCE = 'your own files of JSON objects {"text": "…"}, one a line or in a list'
LICENSE = "that of the files"


def read(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One document an object."""
    for record in records(raw_dir, encoding):
        if isinstance(record, Skip):
            yield record
        elif not isinstance(record.data, dict):
            yield Skip("not_json", record.where, record.data)
        elif not isinstance(record.data.get("text"), str):
            yield Skip("wrong_type", record.where, str(record.data))
        elif not record.data["text"].strip():
            yield Skip("empty_text", record.where, str(record.data))
        else:
            yield as_row(record, text=record.data["text"])
