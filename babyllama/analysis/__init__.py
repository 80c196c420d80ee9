"""Measurements of a model, what a run takes and how it is watched; a supervisor."""
