# Everything a developer or CI does, by name. `make run` and `make test` need root, Python 3.11 and
# nothing else: they install what is missing.

VENV    := .venv
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' kpmd/__init__.py)
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
VM_APT  := $(shell sed "s,[#].*,," tests/vm/apt-packages.txt)
RUN_APT := python3-venv libbpf1 libseccomp2
BPF_APT := clang llvm libbpf-dev bpftool
# What the commands in the documentation use, and are run with.
DOCS_APT := curl jq xxd openssl
# Shells that complete, and a reader of manual pages.
TERMINAL_APT := zsh fish groff-base
DEB_APT := debhelper dpkg-dev lintian
# promtool. (Where there is a systemd, installing it starts a Prometheus.)
PROM_APT := prometheus
# kubectl, Helm and the image's base are not of this Debian: tests/cluster/tools.py, requirements.txt.
CLUSTER_APT := mmdebstrap buildah crun curl iproute2
BROWSER_APT := chromium chromium-driver fonts-dejavu-core
SECONDS ?= 10
KERNEL  ?= 6.12
FUZZ    ?= 50
COUNT   ?= vfs_read vfs_write vfs_open
# Kernels of the matrix; `own` is this machine's, without a VM.
KERNELS ?= 6.12 7.3 6.1 5.10
VM_TESTS := $(addprefix vm-kernel-,$(KERNELS))
# With and without kprobe multi.
SYSTEMD_KERNELS ?= 6.12 6.1
SYSTEMD_TESTS := $(addprefix vm-systemd-,$(SYSTEMD_KERNELS))
# Of each lock file: $folder is where it is made, $options what is added.
PIP_COMPILE := for lock in "requirements.txt" "requirements-tracing.txt --extra tracing" \
		"requirements-dev.txt --extra dev --extra tracing"; do \
	$(VENV)/bin/pip-compile --quiet --generate-hashes --no-header --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links $$options -o $$folder/$$lock pyproject.toml || exit 1; \
	done
PIP_LICENSES := $(VENV)/bin/pip-licenses --format markdown --with-urls
# Of tools, nothing of which is in a package of kpmd; what may be is in pyproject.toml.
TOOL_LICENCES := 0BSD;0BSD OR CC0-1.0;Apache;Apache-2.0;Apache-2.0 OR BSD-2-Clause;Apache Software License;BSD;\
	BSD License;BSD-2-Clause;BSD-3-Clause;ISC License (ISCL);MIT;MIT License;MIT OR Apache-2.0;MPL-2.0;\
	Mozilla Public License 2.0 (MPL 2.0);Python Software Foundation License;\
	GNU Lesser General Public License v3 (LGPLv3)
# Where the Debian package is tried: the number of a Debian, and a kernel.
DEB_TESTS := deb-12-6.1 deb-13-6.12
DEB ?= build/deb
LINTIAN := lintian
# With COVERAGE=1 what the tests outside VMs run of kpmd is counted; they take half as long again.
PYTEST  := $(if $(COVERAGE),$(VENV)/bin/coverage run,$(PY)) -m pytest
# The stages of `make test`. What uses both processors goes first; then two at a time, the longest
# early, what keeps one busy.
STAGES := setup clean-coverage unit test-terminal test-process test-fuzz setup-tests
SIDE_BY_SIDE := $(SYSTEMD_TESTS) $(VM_TESTS) check docs test-dist test-objects check-metrics test-browser \
	check-bpf test-own lock-check licences
TWO_AT_ONCE := --no-print-directory --jobs 2 --output-sync=target

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test setup setup-run setup-vm setup-bpf setup-tests setup-browser check unit test-process test-fuzz test-own test-kernel \
	test-systemd test-vm test-terminal test-browser $(SYSTEMD_TESTS) $(VM_TESTS) fuzz vm fetch bpf check-bpf check-metrics openapi docs man \
	deb deb-tested test-deb $(DEB_TESTS) image test-container test-objects test-packages pictures lock lock-check licences dist test-dist coverage clean-coverage coverage-report soak scheduled format bench bench-peers clean

## run: the daemon, and a live count of kernel functions through it, for SECONDS (10)
run: $(STAMP) setup-run
	@if $(PY) -m tests.tools.demo --can-run-here; then \
		exec $(PY) -m tests.tools.demo --seconds $(SECONDS) -- $(COUNT); \
	else \
		deploy/apt-install $(VM_APT) && exec $(PY) -m tests.vm run --kernel $(KERNEL) -- \
			$(PY) -m tests.tools.demo --seconds $(SECONDS) -- $(COUNT); \
	fi

## test: all tests: static checks, unit, HTTP, on real kernels, and under a real systemd; with times
test:
	@COVERAGE=1 python3 tests/tools/stages.py $(STAGES) -- $(SIDE_BY_SIDE) -- coverage-report

## setup: the virtual environment alone
setup: $(STAMP)

$(STAMP): requirements-dev.txt pyproject.toml
	@deploy/apt-install python3-venv
	@test -x $(PY) || python3 -m venv $(VENV)
	@$(PY) -m pip install --quiet --require-hashes -r requirements-dev.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

setup-run:
	@deploy/apt-install $(RUN_APT)

setup-vm:
	@deploy/apt-install $(VM_APT)

setup-bpf:
	@deploy/apt-install $(BPF_APT)

## check: static checks
check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@$(PY) -m tests.tools.openapi | cmp - openapi.yaml || { echo "run: make openapi" >&2; exit 1; }

## unit: unit and HTTP tests, without a VM
unit: $(STAMP) setup-run
	@deploy/apt-install cpio
	$(PYTEST) --numprocesses 2 -m "not alone"
	$(PY) -m pytest -m alone

## coverage: of kpmd's lines and branches by the tests outside VMs; in build/coverage
# In processes that the tests start, too. What runs as another user, or is killed, is not counted.
coverage: $(STAMP) clean-coverage
	@$(MAKE) --no-print-directory COVERAGE=1 unit test-terminal test-process test-fuzz test-own
	@$(MAKE) --no-print-directory coverage-report

clean-coverage:
	@rm -rf build/coverage && mkdir -p build/coverage

## coverage-report: of the tests that ran with COVERAGE=1; fails below what pyproject.toml says
coverage-report: $(STAMP)
	@$(VENV)/bin/coverage combine --quiet build/coverage
	@$(VENV)/bin/coverage html --quiet
	@$(VENV)/bin/coverage report

## test-terminal: kpmctl on terminals, in shells, and as a manual
test-terminal: $(STAMP) setup-run
	@deploy/apt-install $(TERMINAL_APT)
	$(PYTEST) --numprocesses 2 tests/terminal

## test-browser: the dashboard in a headless browser
test-browser: $(STAMP) setup-run setup-browser
	$(PY) -m pytest tests/browser

setup-browser:
	@deploy/apt-install $(BROWSER_APT)

## test-process: the processes that load programs, on this machine's own kernel
test-process: $(STAMP) setup-run
	$(PYTEST) --numprocesses 2 tests/process

## test-fuzz: a short run of tests/fuzz, the same each time
test-fuzz: $(STAMP) setup-run
	$(PYTEST) --numprocesses 2 tests/fuzz

## test-own: the kernel tests on this machine's own kernel
test-own: $(STAMP) setup-run
	KPMD_TEST_KERNEL=own $(PYTEST) tests/kernel

## test-kernel: the kernel tests in a VM for each of KERNELS, two at a time
test-kernel: setup-tests
	@$(MAKE) $(TWO_AT_ONCE) $(VM_TESTS)

## test-systemd: the units under a real systemd, in VMs with SYSTEMD_KERNELS, two at a time
test-systemd: setup-tests
	@$(MAKE) $(TWO_AT_ONCE) $(SYSTEMD_TESTS)

## test-vm: all that runs in VMs, two at a time, the longest first
test-vm: setup-tests
	@$(MAKE) $(TWO_AT_ONCE) $(SYSTEMD_TESTS) $(VM_TESTS)

# The name of the kernel is what the % stands for.
$(VM_TESTS): vm-kernel-%:
	$(PY) -m tests.vm run --kernel $* --timeout 1200 -- \
		env KPMD_TEST_KERNEL=$* $(PY) -m pytest --durations 25 --timeout 600 tests/kernel

$(SYSTEMD_TESTS): vm-systemd-%:
	$(PY) -m tests.vm run --systemd --kernel $* --timeout 1800 -- \
		$(PY) -m pytest --durations 25 --timeout 300 tests/systemd

## fuzz: a longer run of tests/fuzz and of mutated objects: FUZZ (50) times as much, others each time
fuzz: setup-tests
	KPMD_FUZZ=$(FUZZ) $(PY) -m pytest --numprocesses 2 --timeout 3600 tests/fuzz
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 7200 -- env KPMD_FUZZ=$(FUZZ) \
		KPMD_TEST_KERNEL=$(KERNEL) $(PY) -m pytest --timeout 7000 tests/kernel/test_mutated.py

## soak: a thousand clients that come and die, for ten minutes, in a VM
soak: $(STAMP) setup-run setup-vm
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 3000 -- $(PY) -m tests.bench soak

## scheduled: the longer run: newest dependencies, all tests, fuzzing, soak, benchmarks; takes hours
scheduled:
	@python3 tests/tools/stages.py setup lock setup test test-packages fuzz soak bench

# All at once: two stages side by side could not.
setup-tests: $(STAMP) setup-run setup-vm setup-bpf setup-browser
	@deploy/apt-install $(DOCS_APT) $(PROM_APT)

## bench: compare with C programs on libbpf and a bare HTTP server; not part of the tests
bench: $(STAMP) setup-run setup-vm setup-bpf
	$(PY) -m tests.bench prepare
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 3000 -- $(PY) -m tests.bench vm
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 1800 -- $(PY) -m tests.bench data
	$(PY) -m tests.bench here

## bench-peers: the same questions to kpmctl, bpftrace and bcc's tools; docs/comparison.md
bench-peers: $(STAMP) setup-run setup-vm setup-bpf
	$(PY) -m tests.bench prepare --peers
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 3600 -- $(PY) -m tests.bench peers

## vm: a shell in a VM with the kernel KERNEL (6.12)
vm: $(STAMP) setup-run setup-vm
	@$(PY) -m tests.vm shell --kernel $(KERNEL)

## fetch: download the kernels of the matrix, and make the Debian for test-systemd
fetch: $(STAMP) setup-vm
	@$(PY) -m tests.vm fetch
	@$(PY) -m tests.vm fetch --systemd

## bpf: compile the BPF programs that ship with kpmd, and those of the tests
bpf: setup-bpf
	kpmd/builtin/build.sh kpmd/builtin
	kpmd/builtin/build.sh tests/objects
	tests/objects/elsewhere/build.sh linked

## check-bpf: whether source and object of the BPF programs agree
check-bpf: setup-bpf
	kpmd/builtin/build.sh --check kpmd/builtin
	kpmd/builtin/build.sh --check tests/objects
	tests/objects/elsewhere/build.sh --check linked

## check-metrics: what promtool says of GET /metrics, of the alerts and their tests, and of the dashboard
check-metrics: $(STAMP) setup-run
	@deploy/apt-install $(PROM_APT)
	promtool check config deploy/prometheus/prometheus.yml
	promtool test rules deploy/prometheus/kpmd.rules.test.yml
	@mkdir -p build
	$(PY) -m tests.tools.metrics text > build/metrics.txt && promtool check metrics < build/metrics.txt
	$(PY) -m tests.tools.metrics rules > build/dashboard.yml && promtool check rules build/dashboard.yml

## openapi: write openapi.yaml from the route table and the models
openapi: $(STAMP)
	$(PY) -m tests.tools.openapi > openapi.yaml

## docs: the documentation, in build/docs, and the manual pages
docs: $(STAMP) man
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs build/docs

## man: the manual pages of kpmctl, in build/man
man: $(STAMP)
	@$(PY) -m tests.tools.man build/man >/dev/null

## deb: the Debian package, in build/deb
deb: $(STAMP)
	@deploy/apt-install $(DEB_APT)
	@rm -rf $(DEB) && $(PY) deploy/debian/assemble.py $(DEB)/source
	@cd $(DEB)/source && dpkg-buildpackage --build=binary --no-sign >../build.log 2>&1 || \
		{ cat ../build.log; exit 1; }
	@rm -rf $(DEB)/source
	@# Whoever distributes the package has an address; the project has none.
	@$(LINTIAN) --allow-root --fail-on error,warning $(DEB)/*.changes \
		--suppress-tags bogus-mail-host,bogus-mail-host-in-debian-changelog
	@ls -s --block-size=kB $(DEB)/*.deb

## deb-tested: the package, the same bytes each time, and as a later version
deb-tested: deb
	@$(MAKE) --no-print-directory deb DEB=build/deb/again LINTIAN=:
	@cmp build/deb/*.deb build/deb/again/*.deb
	@mkdir build/deb/later
	@$(PY) -m tests.packages.later build/deb/*.deb build/deb/later/kpmd.deb

## test-deb: the Debian package's life in VMs with Debian 12 and 13
test-deb: deb-tested setup-vm
	@$(MAKE) $(TWO_AT_ONCE) $(DEB_TESTS)

# By the guest's own Python: the project's may be this machine's, which that Debian does not have.
$(DEB_TESTS): deb-%:
	$(PY) -m tests.vm run --systemd --debian $(firstword $(subst -, ,$*)) \
		--kernel $(lastword $(subst -, ,$*)) --timeout 1200 -- \
		env --unset PYTEST_PLUGINS PYTHONPATH=$(abspath $(wildcard $(VENV)/lib/python3*/site-packages)) \
		/usr/bin/python3 -m pytest --config-file tests/packages/pytest.ini --exitfirst \
		--durations 12 tests/packages

## pictures: the README's pictures of kpmctl
pictures: $(STAMP)
	$(PY) -m tests.tools.pictures docs/pictures

## lock: take the newest versions of all dependencies into the lock files
lock: $(STAMP)
	@folder=. options=--upgrade; $(PIP_COMPILE)

## lock-check: whether the lock files are what pyproject.toml makes with the versions in them
lock-check: $(STAMP)
	@rm -rf build/lock && mkdir -p build/lock && cp requirements*.txt build/lock/
	@folder=build/lock; $(PIP_COMPILE)
	@for lock in requirements*.txt; do \
		diff --unified $$lock build/lock/$$lock || \
			{ echo "build/lock has what it should be; make lock takes the newest" >&2; exit 1; }; \
	done
	@! grep -En '^ *--(index-url|extra-index-url|find-links|trusted-host)|://' requirements*.txt

## licences: of all that is locked, in build/licences.md; fails for one that is not on the lists
licences: $(STAMP)
	@mkdir -p build/licences
	@$(PY) -m tests.tools.locked build/licences/runtime requirements-tracing.txt
	@$(PY) -m tests.tools.locked build/licences/tools requirements-dev.txt --without requirements-tracing.txt
	@set -e; { \
		printf '# What kpmd runs with\n\n'; \
		$(PIP_LICENSES) --python build/licences/runtime/bin/python; \
		printf '\n# Tools that build and test it, and are no part of it\n\n'; \
		$(PIP_LICENSES) --python build/licences/tools/bin/python --allow-only "$(TOOL_LICENCES)"; \
	} > build/licences.md
	@echo "build/licences.md: $$(grep -c '^| [^N]' build/licences.md) packages"

## dist: sdist, wheels, SBOM and checksums, in build/dist
dist: $(STAMP)
	@$(PY) -m tests.tools.dist build/dist

## test-dist: what dist makes: the same each time, installed in clean environments, and run
test-dist: $(STAMP) setup-run
	$(PY) -m pytest tests/dist

## image: the container image of what `make deb` made, in build/image
image: $(STAMP)
	@test -e build/deb/kpmd_$(VERSION)_amd64.deb || $(MAKE) deb
	@deploy/apt-install $(CLUSTER_APT)
	@$(PY) -m tests.cluster.image

## test-objects: the objects for Kubernetes, by kubectl and by Helm, and the commands of their page
HELM := build/cluster/python
test-objects: $(STAMP) $(HELM)/helm_sdkpy
	@deploy/apt-install mmdebstrap
	$(PY) -m pytest tests/cluster --ignore tests/cluster/test_container.py

$(HELM)/helm_sdkpy: tests/cluster/requirements.txt
	@$(PY) -m pip install --quiet --upgrade --target $(HELM) --no-deps --ignore-requires-python \
		--python-version 3.12 --only-binary :all: --require-hashes -r $<
	@touch $@

## test-container: the image, run as the objects say, in a VM
test-container: image setup-vm setup-bpf $(HELM)/helm_sdkpy
	@$(PY) -m tests.cluster.objects
	$(PY) -m tests.vm run --kernel $(KERNEL) --timeout 1200 -- env KPMD_TEST_KERNEL=$(KERNEL) \
		$(PY) -m pytest --durations 8 --timeout 300 tests/cluster/test_container.py

## test-packages: all that is given out, where it is to run: takes a quarter of an hour
test-packages: deb-tested image
	@$(MAKE) $(TWO_AT_ONCE) $(DEB_TESTS) test-container test-objects test-dist

## format: format all Python
format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
