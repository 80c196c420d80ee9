"""An OpenAI-compatible server with a chat page: python -m serve.server."""

import babyllama  # noqa: F401  (says what to do where nothing is installed)
