"""The articles of inews as pairs of body and headline, where the headline fits the body."""

from data_process.datasets.inews import LICENSE, PACKAGE, SHARES, SOURCE, read_dir

__all__ = ["LICENSE", "PACKAGE", "SHARES", "SOURCE", "read_dir"]

KIND = "summary"
RULES = "headline"
REFUSED_COUNT = True
IDS = "inews"
