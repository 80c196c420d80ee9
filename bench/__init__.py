"""The named benchmarks, offline: an adapter to lm-evaluation-harness, task files, a report."""

import babyllama  # noqa: F401  (says what to do where nothing is installed)
