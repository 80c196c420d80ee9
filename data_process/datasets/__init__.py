"""The catalogue of data sets, and the readers that make rows of their records (registry.py)."""
