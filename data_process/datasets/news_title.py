"""The articles of news.py as pairs of body and headline, where the headline fits the body."""

from data_process.datasets.news import IDS, LICENSE, SHARES, SOURCE, read

__all__ = ["IDS", "LICENSE", "SHARES", "SOURCE", "read"]

KIND = "summary"
RULES = "headline"
REFUSED_COUNT = True
