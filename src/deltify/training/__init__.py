"""Distillation: the run, its stages, the training loop, and the files of a run."""
