"""Finished models for other runtimes, one a file."""
