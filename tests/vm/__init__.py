"""Runs commands on real kernels in qemu; see the README beside this file."""
