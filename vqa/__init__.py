"""Questions about pictures: an encoder in front of the same language model."""
