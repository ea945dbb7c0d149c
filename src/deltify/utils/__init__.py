"""Helpers for all packages: files, fingerprints, devices, folders, token ids and the terminal."""
