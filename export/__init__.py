"""Checkpoints in the formats of other tools, with proof that they behave the same there."""
