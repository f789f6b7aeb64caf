# SPDX-License-Identifier: GPL-2.0-only
# mypy: ignore-errors
"""Compile a PythonBPF source: ``compile_pythonbpf.py SOURCE OBJECT``, in PythonBPF's environment.

PythonBPF makes LLVM's intermediate language, and would call the machine's ``llc`` then. The LLVM
in llvmlite, which PythonBPF comes with, knows BPF as well, and is pinned.
"""

import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
from pythonbpf import compile_to_ir

source, target = sys.argv[1:]
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
with tempfile.NamedTemporaryFile(suffix=".ll") as file:
    compile_to_ir(source, file.name, loglevel="WARNING")
    module = llvm.parse_assembly(Path(file.name).read_text())
machine = llvm.Target.from_triple("bpfel").create_target_machine(opt=2)
Path(target).write_bytes(machine.emit_object(module))
