"""Pure logic: no file descriptor, no clock, no I/O. May import: ``kpmd.errors``."""
