"""Text to packed token files, and from them batches."""
