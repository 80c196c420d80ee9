"""Faster decoding and training for processors, same numbers: C files, and what calls them."""
