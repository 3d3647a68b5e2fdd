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

.PHONY: help demo test test-rust test-python lint fmt models bench fuzz crash kill interleavings sanitize clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.wheel ## Map, run, fine-tune and save a real model
	@$(BIN)/maptensors demo

test: test-rust test-python ## Run every test: Rust, documentation, wheel, Python

# The python feature is part of the Rust tests where this Python comes with a library to link against;
# where it does not (Debian's without its -dev package), clippy still checks it and pytest runs it.
test-rust: $(VENV)/.base
	$(CARGO) test
	@if $(BIN)/python tools/libpython.py > $(VENV)/libdir; then \
		echo "$(CARGO) test --all-features"; \
		PYO3_PYTHON=$(CURDIR)/$(BIN)/python LD_LIBRARY_PATH="$$(cat $(VENV)/libdir):$$LD_LIBRARY_PATH" \
			$(CARGO) test --all-features; \
	else \
		echo "NOTE: this Python has no shared library: cargo test leaves the python feature to pytest"; \
		echo "$(CARGO) test --features cli"; \
		$(CARGO) test --features cli; \
	fi
	$(CARGO) run --quiet --example digits
	$(CARGO) run --quiet --example live_weights

test-python: $(VENV)/.wheel $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.wheel $(VENV)/.lint ## Check formatting, lints, documentation and type stubs
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --quiet -- -D warnings
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python $(CARGO) clippy --all-targets --all-features --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --quiet --features cli
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest maptensors._native --allowlist tools/stubtest-allowlist.txt --ignore-unused-allowlist

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
bench: $(VENV)/.wheel $(VENV)/.test ## Measure against the peers, write BENCHMARKS.md; QUICK=1 only tries (dist/bench)
	$(CARGO) bench --bench inner -- --noplot $(if $(QUICK),--quick)
	$(if $(QUICK),,$(CARGO) bench --manifest-path benches/peers/Cargo.toml --target-dir benches/peers/target -- --noplot)
	$(BIN)/python benches/compare.py $(if $(BENCH_DATA),--data '$(BENCH_DATA)') $(if $(QUICK),--quick --out dist/bench)

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
	MAPTENSORS_KILLS=$(KILLS) $(CARGO) test --release --test saving kill -- --nocapture
	MAPTENSORS_KILLS=$(KILLS) $(CARGO) test --release --test faults -- --nocapture
	MAPTENSORS_GENERATIONS=$(GENERATIONS) $(CARGO) test --release --test share_processes -- --nocapture

# A build of its own: what it needs is no dependency of any other. loom tries every order, so it takes no number.
SCHEDULES ?= 300
interleavings: ## Try every order of the threads at a control page, and SCHEDULES orders at the checkpoint queue
	for part in share::control checkpoint; do \
		MAPTENSORS_SCHEDULES=$(SCHEDULES) RUSTFLAGS="$$RUSTFLAGS --cfg interleavings" \
			$(CARGO) test --target-dir target/interleavings --lib $$part::interleavings || exit 1; \
	done

# RUSTC_BOOTSTRAP lets a stable compiler take -Z flags. Left out are tests that limit or measure memory, and of
# locked pages: AddressSanitizer makes munlock(2) do nothing.
SANITIZED := checkpoints deltas differential round_trip saving share share_astray share_found shared_edit zero_copy
sanitize: ## Run the Rust tests under AddressSanitizer and LeakSanitizer (half an hour)
	target=$$(rustc -vV | sed -n 's/^host: //p'); \
	check() { RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=1 \
		$(CARGO) test --target $$target --target-dir target/asan "$$@"; }; \
	check --lib -- --skip locking_copies_no_page --skip locks_and_unlocks_that_race && \
	check $(addprefix --test ,$(SANITIZED))

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

$(VENV)/.wheel: $(VENV)/.base $(SOURCES)
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist
	$(PIP) --force-reinstall --no-deps dist/*.whl
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(PIP) --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.base pyproject.toml
	$(PIP) --group lint
	@touch $@
