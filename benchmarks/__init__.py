"""Benchmarks of a checkout, run with `pyface bench NAME`. They are not part of the installed package."""
