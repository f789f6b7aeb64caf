#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds every BPF source of a folder, each object beside its source:
#   build.sh FOLDER
# or builds into a temporary folder and fails where an object is not what its source makes:
#   build.sh --check FOLDER
# Same sources and compiler, same bytes: the compiler sees relative paths only, and DWARF is stripped
# (BTF stays). A source with the line `/* build: no BTF */` is built without BTF.
set -eu
LC_ALL=C
export LC_ALL
unset CPATH C_INCLUDE_PATH

check=
if [ "$1" = --check ]; then
	check=1
	shift
fi
folder=$1
cd "$folder"
out=.
if [ -n "$check" ]; then
	out=$(mktemp -d)
	trap 'rm -rf "$out"' EXIT
fi

status=0
for source in *.bpf.c; do
	object=${source%.c}.o
	debug=-g
	if grep -qF '/* build: no BTF */' "$source"; then
		debug=
	fi
	# The headers in asm/ lie in the machine's own folder, where a BPF target does not look.
	${CLANG:-clang} -target bpf -O2 $debug -Wall -Werror -fdebug-compilation-dir=. \
		-idirafter "/usr/include/$(uname -m)-linux-gnu" -c "$source" -o "$out/$object"
	${LLVM_STRIP:-llvm-strip} -g "$out/$object"
	if [ -n "$check" ] && ! cmp "$out/$object" "$object"; then
		echo "$folder/$object is not what $source makes: run make bpf" >&2
		status=1
	fi
done
exit $status
