"""Decoding and block attention for CUDA cards; a folder that can be deleted."""
