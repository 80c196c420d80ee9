"""A dialogue with a checkpoint: the session, its commands, the terminal."""
