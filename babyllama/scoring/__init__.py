"""Summaries: their rows in training, titles by beam search, test sets, ROUGE, tables, a page."""
