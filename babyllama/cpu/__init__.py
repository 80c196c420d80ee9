"""Faster decoding for processors, with the same numbers: C files, and what calls them."""
