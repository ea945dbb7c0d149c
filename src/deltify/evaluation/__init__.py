"""Evaluation of models side by side: held-out text, benchmarks, needles, positions, decoding, and reports."""
