# Every target does its own set-up: Rust and Python 3.11 or later are all that must be there.
# What Python needs goes into .venv; nothing is installed anywhere else.

PYTHON ?= python3
CARGO ?= cargo
VENV := .venv
BIN := $(VENV)/bin
# Pip's chatter off, its errors on.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

SOURCES := $(shell find src python/maptensors examples models -name '*.rs' -o -name '*.py' -o -name '*.pyi' \
	-o -name '*.safetensors') Cargo.toml pyproject.toml README.md

.PHONY: help demo test test-rust test-python check lint ci fmt models bench against fuzz crash kill interleavings sanitize \
	semver clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.wheel-release ## Map, run, fine-tune and save a real model
	@$(BIN)/maptensors demo

# Rust is built with one set of features. The python feature is part of it where this Python comes with a library to link
# against; where it does not (Debian's without its -dev package), clippy still checks it and pytest runs it.
LIBDIR = $(shell $(BIN)/python tools/libpython.py)
FEATURES = $(if $(LIBDIR),--all-features,--features "cli serde safetensors")
PYTHON_ENV = PYO3_PYTHON=$(CURDIR)/$(BIN)/python $(if $(LIBDIR),LD_LIBRARY_PATH="$(LIBDIR):$$LD_LIBRARY_PATH")

# What was skipped, by Rust and by Python: tools/skips.py compares it with tests/skips.txt.
SKIPS := $(CURDIR)/target/skips
# How long each part takes, said at the end.
TIMED = tools/timed.sh $@
begin = @mkdir -p target && touch target/times && sed -i '/^$@: /d' target/times && rm -f $(SKIPS)
end = @tools/timed.sh $@

# What only `check` runs, since it takes longest: every operation and every system call of a save refused in turn.
LONG_RUST := faults::
LONG_PYTHON := open/test_real_models.py

# Two processes, since most tests wait for processes of their own: `--dist worksteal` keeps both busy.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# A command line of `cargo test` ends in `--` and what the tests are given.
test: $(VENV)/.base $(VENV)/.wheel-dev $(VENV)/.test ## Run what is needed to trust a change: Rust, documentation, Python
	$(begin)
	$(TIMED) env $(PYTHON_ENV) MAPTENSORS_SKIPS=$(SKIPS) $(CARGO) test --no-fail-fast $(FEATURES) -- $(addprefix --skip ,$(LONG_RUST))
	$(TIMED) env $(PYTHON_ENV) $(CARGO) run --quiet $(FEATURES) --example digits
	$(TIMED) env $(PYTHON_ENV) $(CARGO) run --quiet $(FEATURES) --example live_weights
	$(TIMED) env MAPTENSORS_SKIPS=$(SKIPS) $(PYTEST) $(addprefix --ignore tests/python/,$(LONG_PYTHON))
	$(BIN)/python tools/skips.py $(SKIPS)
	$(end)

check: $(VENV)/.base $(VENV)/.wheel-dev $(VENV)/.test ## Run the rest: crashes, kills, real models, interleavings, benches tried
	$(begin)
	$(TIMED) $(CARGO) check --quiet --no-default-features --tests
	$(TIMED) env $(PYTHON_ENV) MAPTENSORS_SKIPS=$(SKIPS) $(CARGO) test --no-fail-fast $(FEATURES) --lib --test save -- $(LONG_RUST)
	$(TIMED) env $(PYTHON_ENV) $(CARGO) test --quiet $(FEATURES) --benches
	$(TIMED) env MAPTENSORS_SKIPS=$(SKIPS) $(PYTEST) $(addprefix tests/python/,$(LONG_PYTHON))
	$(TIMED) $(MAKE) --no-print-directory interleavings SCHEDULES=20
	$(BIN)/python tools/skips.py $(SKIPS)
	$(end)

lint: $(VENV)/.wheel-dev $(VENV)/.lint ## Check formatting, lints, documentation and type stubs
	$(begin)
	$(TIMED) $(CARGO) fmt --check
	$(TIMED) env PYO3_PYTHON=$(CURDIR)/$(BIN)/python $(CARGO) clippy --all-targets --all-features --quiet -- -D warnings
	$(TIMED) env RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --quiet --features "cli serde safetensors"
	$(TIMED) $(BIN)/ruff check
	$(TIMED) $(BIN)/ruff format --check
	$(TIMED) $(BIN)/mypy
	$(TIMED) $(BIN)/stubtest maptensors._native --allowlist tools/stubtest-allowlist.txt --ignore-unused-allowlist
	$(end)

fmt: $(VENV)/.lint ## Format all code
	$(CARGO) fmt
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

models: $(VENV)/.test ## Train the models of models/ again (same bytes)
	$(BIN)/python models/train.py
	$(BIN)/python models/make_golden.py

# The files it makes, some 6 GiB and far more in holes, go under BENCH_DATA, or where they are gone afterwards.
QUICK ?=
BENCH_DATA ?=
bench: $(VENV)/.wheel-release $(VENV)/.test ## Measure against the peers, write BENCHMARKS.md; QUICK=1 only tries (dist/bench)
	$(CARGO) bench --bench inner -- --noplot $(if $(QUICK),--quick)
	$(if $(QUICK),,$(CARGO) bench --manifest-path benches/peers/Cargo.toml --target-dir benches/peers/target -- --noplot)
	$(BIN)/python benches/compare.py $(if $(BENCH_DATA),--data '$(BENCH_DATA)') $(if $(QUICK),--quick --out dist/bench)

# The other build is in an environment that has numpy, torch and safetensors too.
OTHER ?=
ONLY ?=
against: $(VENV)/.wheel-release $(VENV)/.test ## Time this build against another, in one run: OTHER=its Python, ONLY="many-save big"
	@test -n '$(OTHER)' || { echo 'name the Python that has the other build: make against OTHER=/path/to/python'; exit 1; }
	$(BIN)/python benches/against.py '$(OTHER)' $(if $(BENCH_DATA),--data '$(BENCH_DATA)') $(addprefix --only ,$(ONLY))

SECONDS_PER_TARGET ?= 600
fuzz: ## Fuzz header and index against the reference, ten minutes each (needs nightly Rust)
	$(CARGO) +nightly fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	for target in header header_json index; do \
		$(CARGO) +nightly fuzz run $$target -- -max_total_time=$(SECONDS_PER_TARGET) -max_len=4096 || exit 1; \
	done

CRASH_STATES ?= 4000
crash: ## Look at what a power loss may leave of every kind of save, thoroughly (minutes)
	MAPTENSORS_CRASH_STATES=$(CRASH_STATES) $(CARGO) test --release --lib crash -- --nocapture

KILLS ?= 2000
GENERATIONS ?= 10000
kill: ## Kill saving, publishing and reading processes at random instants, many times; no file may be lost
	MAPTENSORS_KILLS=$(KILLS) $(CARGO) test --release --test save kill -- --nocapture
	MAPTENSORS_KILLS=$(KILLS) $(CARGO) test --release --test save faults:: -- --nocapture
	MAPTENSORS_GENERATIONS=$(GENERATIONS) $(CARGO) test --release --test share processes:: -- --nocapture

# A build of its own: what it needs is no dependency of any other. loom tries every order, so it takes no number.
SCHEDULES ?= 300
interleavings: ## Try every order of the threads at a control page, and SCHEDULES orders at the checkpoint queue
	for part in share::control checkpoint; do \
		MAPTENSORS_SCHEDULES=$(SCHEDULES) RUSTFLAGS="$$RUSTFLAGS --cfg interleavings" \
			$(CARGO) test --target-dir target/interleavings --lib $$part::interleavings || exit 1; \
	done

# RUSTC_BOOTSTRAP lets a stable compiler take -Z flags. Left out are tests that limit or measure memory, and of
# locked pages: AddressSanitizer makes munlock(2) do nothing.
SANITIZED := astray:: atomic:: checkpoints:: deltas:: differential:: found:: generations:: round_trip:: shared_edit:: \
	zero_copy::
sanitize: ## Run the Rust tests under AddressSanitizer and LeakSanitizer (half an hour)
	target=$$(rustc -vV | sed -n 's/^host: //p'); \
	check() { RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=1 \
		$(CARGO) test --target $$target --target-dir target/asan "$$@"; }; \
	check --lib -- --skip locking_copies_no_page --skip locks_and_unlocks_that_race && \
	check --test memory --test open --test save --test share -- $(SANITIZED)

# The revision that the public API must be compatible with.
BASELINE ?= $(shell git describe --tags --abbrev=0 2>/dev/null)
semver: ## Compare the public API with BASELINE's, a revision; the last tag, where there is one
	@test -n "$(BASELINE)" || { echo "there is no tag yet: name a revision with make semver BASELINE=..."; exit 1; }
	$(CARGO) semver-checks --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-semver-checks
	$(CARGO) semver-checks --default-features --baseline-rev $(BASELINE)

clean: ## Remove what the targets made
	rm -rf $(VENV) dist
	$(CARGO) clean

# A venv with a pip that knows dependency groups, and the build tool.
$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "maptensors needs Python 3.11 or later; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1' 'maturin>=1.16,<2'
	@touch $@

# One wheel is installed at a time: `dev` is what is tested, `release` what is measured and shown. Both have build
# directories of their own, since pyo3 links an extension module otherwise than what `cargo test` runs.
$(VENV)/.wheel-dev $(VENV)/.wheel-release: $(VENV)/.wheel-%: $(VENV)/.base $(SOURCES)
	rm -rf dist $(VENV)/.wheel-*
	tools/timed.sh set-up $(BIN)/maturin build --profile $* --target-dir target/wheel --quiet --out dist
	$(PIP) --force-reinstall --no-deps dist/*.whl
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	tools/timed.sh set-up $(PIP) --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.base pyproject.toml
	tools/timed.sh set-up $(PIP) --group lint
	@touch $@
