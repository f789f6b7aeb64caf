"""The commands in the documentation, run as they stand there."""
