"""Benchmarks: our attention beside its peers, in one run."""
