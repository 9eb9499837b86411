PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

MINOR := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
LOCK := locks/$(MINOR).txt
PY := $(VENV)/bin/python
# The stamp names the Python, so that another PYTHON builds the environment anew.
LOCKED := $(VENV)/.locked-$(MINOR)
INSTALLED := $(VENV)/.installed-$(MINOR)

RUN := runs/quickstart
BUILD := build/quickstart
# Python files without test suites and installed packages; every twentieth file is held out.
CORPUS := --include '*.py' --exclude site-packages --exclude test --exclude tests --exclude idle_test --held-out 0.05

export JAX_PLATFORMS ?= cpu

.PHONY: help install quickstart check-quickstart test peers test-slow gate soak hardware-check lint format lock clean

help:
	@echo "make install     the locked environment in $(VENV) (every target below does this first)"
	@echo "make quickstart  tokenizer, token store, a small model, a resume and a sample, in minutes on a CPU"
	@echo "make test        the fast tests"
	@echo "make peers       the libraries that some tests compare with, in $(VENV) too: PyTorch, Transformers, libtpu"
	@echo "make test-slow   the slow tests, and those against peer libraries where these are installed"
	@echo "make gate        figures of compiled programs against the stored ones; fails where one got worse"
	@echo "make soak        random kills and resumes, and mixed load on a server, SOAK_MINUTES each; cases of minutes"
	@echo "make hardware-check  on a TPU: kernels against the reference, times beside predictions, one JSON"
	@echo "make lint        ruff and mypy"
	@echo "make lock        write $(LOCK) anew from pyproject.toml"
	@echo "make clean       remove what the targets made, but for $(VENV)"
	@echo "PYTHON=python3.12 chooses another Python (3.11 to 3.13)"

install: $(INSTALLED)

$(LOCK):
	@echo "no $(LOCK): mosaicjax runs on Python 3.11 to 3.13; try: make PYTHON=python3.12" >&2; exit 2

$(LOCKED): $(LOCK)
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --requirement $(LOCK)
	touch $@

# The build backend is in the lock, so that nothing unlocked is fetched here.
$(INSTALLED): pyproject.toml $(LOCKED)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test: $(INSTALLED)
	$(PY) -m pytest -m "not slow and not peer and not soak" -n $(WORKERS)

# Large, and of no use but to compare with: in no lock. A CPU build of PyTorch, where pip can find one, will do.
peers: $(INSTALLED)
	$(PY) -m pip install --quiet --requirement tests/peers.txt

# pytest exits with 5 when a marker selects nothing, which is no failure of this tier.
test-slow: $(INSTALLED)
	$(PY) -m pytest -m "(slow or peer) and not soak" -n $(WORKERS) || test $$? -eq 5

gate: $(INSTALLED)
	$(PY) benchmarks/gate.py

soak: $(INSTALLED)
	$(PY) -m pytest -m soak

# Where JAX_PLATFORMS says cpu it would look no further.
hardware-check: $(INSTALLED)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[tpu]'
	env -u JAX_PLATFORMS $(PY) benchmarks/kernels/hardware_check.py

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The corpus is the standard library of the Python at hand: real text that every machine already has.
quickstart: $(INSTALLED)
	rm -rf $(BUILD) $(RUN)
	mkdir -p $(BUILD)
	stdlib=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') && \
	$(VENV)/bin/mosaicjax data train-tokenizer "$$stdlib" --out $(BUILD)/tokenizer --vocab 4096 $(CORPUS) && \
	$(VENV)/bin/mosaicjax data build "$$stdlib" --out $(BUILD)/store --tokenizer $(BUILD)/tokenizer $(CORPUS)
	@echo "training for 60 s; then SIGTERM, as a scheduler would; then the same command goes on"
	timeout --signal=TERM 60 $(VENV)/bin/mosaicjax train recipes/quickstart.py --out $(RUN) || test $$? -eq 124
	$(VENV)/bin/mosaicjax train recipes/quickstart.py --out $(RUN)
	$(VENV)/bin/mosaicjax evaluate $(RUN)
	$(VENV)/bin/mosaicjax generate $(RUN) --prompt "def read_lines(path):"

check-quickstart: $(INSTALLED)
	$(PY) tests/check_quickstart.py $(RUN)

# What is locked stays as it is, so that a new dependency moves nothing else; UPGRADE=1 takes the newest of all.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock/venv
	build/lock/venv/bin/python -m pip install --quiet --editable '.[dev]' \
		$(if $(UPGRADE),,$(if $(wildcard $(LOCK)),--constraint $(LOCK)))
	printf '# Core and dev dependencies on Python %s: written by `make lock`, never by hand.\n' \
		"$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')" > build/lock/lock.txt
	build/lock/venv/bin/python -m pip freeze --exclude-editable | LC_ALL=C sort -f >> build/lock/lock.txt
	@if grep -nE '@|://|--hash' build/lock/lock.txt; then echo "the lock names a place; see above" >&2; exit 1; fi
	mkdir -p locks
	mv build/lock/lock.txt $(LOCK)
	rm -rf build/lock

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
