"""Measurements of a model: perplexity, memory over turns, loops, and what a run takes."""
