"""Distillation: the stages, the training loop, and all that a run keeps."""
