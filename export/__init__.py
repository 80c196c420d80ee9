"""Checkpoints in the formats of other tools, with proof that they behave the same there."""

import babyllama  # noqa: F401  (says what to do where nothing is installed)
