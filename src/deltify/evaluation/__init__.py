"""What came out: benchmarks, needles, curves and reports."""
