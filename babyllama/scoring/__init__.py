"""Summaries of a test set and what they are worth: test sets, ROUGE, tables, probes, a page."""
