"""Measurements of a model: perplexity, memory over turns, loops, what a run takes; a supervisor."""
