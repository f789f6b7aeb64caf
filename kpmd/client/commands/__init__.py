"""The commands of ``kpmctl``."""
