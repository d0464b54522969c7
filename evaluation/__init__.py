"""Figures, tables, the public benchmarks, and the watch over a run."""
