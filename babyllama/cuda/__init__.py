"""Decoding for CUDA cards; a folder that can be deleted."""
