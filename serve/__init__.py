"""An OpenAI-compatible server with a chat page: python -m serve.server."""
