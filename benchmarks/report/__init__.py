"""The report: what studies and benchmarks found, as one page that opens from disk, with figures and tables."""
