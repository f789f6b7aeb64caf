"""Stand-ins for the kernel, for tests of logic and for faults that a kernel can't be brought to."""
