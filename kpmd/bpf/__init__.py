"""The kernel's side: bpf(2), libbpf, kallsyms and tracefs.

Everything here blocks; a call returns an owned file descriptor or plain data, or raises an error of
``kpmd.errors``. May import: ``kpmd.errors``. The only package that imports ctypes.
"""
