"""The papers' central claims, put to the test on procedural data: ``python -m benchmarks.claims.<method>``."""
