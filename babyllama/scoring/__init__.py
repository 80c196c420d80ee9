"""Summaries of a test set and what they are worth: test sets, ROUGE, titles, tables."""
