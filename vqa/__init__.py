"""Questions about images: an encoder in front of the same language model."""

import babyllama  # noqa: F401  (says what to do where nothing is installed)
