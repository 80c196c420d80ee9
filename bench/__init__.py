"""The named benchmarks, offline: an adapter to lm-evaluation-harness, task files, a report."""
