"""Plain text with one document a line: CLUECorpusSmall, People's Daily and the like."""

from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "text"
LAYOUT = "text"  # a line that happens to be JSON is a document all the same
SOURCE = Source(
    home="your own text files, one document a line",
    manual="put the files into the set's raw directory. Known to fit: CLUECorpusSmall "
    "(github.com/CLUEbenchmark/CLUECorpus2020) in the form of github.com/dbiir/UER-py",
)
LICENSE = "that of the files"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document a line."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        elif isinstance(record.data, str):
            yield as_row(record, text=record.data.strip())
        else:
            yield Skip("not_text", record.where, str(record.data))
