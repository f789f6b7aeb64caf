#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Makes the objects of this folder, or checks that they are what their sources make:
#   build.sh [--check] linked       by clang and bpftool's linker
#   build.sh [--check] pythonbpf    by PythonBPF, in a virtual environment in build/
# PythonBPF is pinned for Python 3.12: PYTHON names it (default python3).
set -eu
LC_ALL=C
export LC_ALL
cd "$(dirname "$0")"

check=
if [ "$1" = --check ]; then
	check=1
	shift
fi
object=
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

case $1 in
linked)
	object=linked.bpf.o
	for each in linked_programs linked_calls; do
		# The headers in asm/ lie in the machine's own folder, where a BPF target does not look.
		${CLANG:-clang} -target bpf -O2 -g -Wall -Werror -fdebug-compilation-dir=. \
			-idirafter "/usr/include/$(uname -m)-linux-gnu" -c $each.bpf.c -o "$out/$each.o"
	done
	PATH=$PATH:/usr/sbin bpftool gen object "$out/$object" "$out/linked_programs.o" "$out/linked_calls.o"
	;;
pythonbpf)
	object=pythonbpf_calls.o
	venv=../../../build/pythonbpf
	if ! [ "$venv.installed" -nt requirements.txt ]; then
		${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || {
			echo "PythonBPF 0.2 is pinned for Python 3.12: name it in PYTHON" >&2
			exit 1
		}
		rm -rf "$venv"
		${PYTHON:-python3} -m venv "$venv"
		"$venv/bin/python" -m pip install --quiet --require-hashes --only-binary :all: -r requirements.txt
		touch "$venv.installed"
	fi
	"$venv/bin/python" compile_pythonbpf.py pythonbpf_calls.py "$out/$object"
	;;
*)
	echo "build.sh [--check] linked|pythonbpf" >&2
	exit 2
	;;
esac
${LLVM_STRIP:-llvm-strip} -g "$out/$object"

if [ -z "$check" ]; then
	mv "$out/$object" "$object"
elif ! cmp "$out/$object" "$object"; then
	echo "$object is not what its sources make: run tests/objects/elsewhere/build.sh $1" >&2
	exit 1
fi
