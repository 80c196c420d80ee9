"""Raw downloads become canonical rows, and rows become token files. No torch.

`run.py` is the command; `registry.py` lists the data sets; one file in `datasets/` reads one
published layout; `clean.py`, `dedup.py` and `split.py` hold the rules that are the same for all.
"""

import babyllama  # noqa: F401  (says what to do where nothing is installed)
