# Two commands for a newcomer: `make demo` and `make test`. Everything happens in .venv, which is made at first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-cluster test-wandb test-null-gpu test-wheel lint format docs install clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(RUN) tools/demo.py

# Two files at a time, by name: ranks wait for each other often, so that two jobs share two cores well.
test: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --durations-min=8

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow

# As root: installs Debian's Slurm (it says what), makes network namespaces, and removes these again.
test-cluster: $(INSTALLED)
	tests/slurm/packages.sh
	$(RUN) -m pytest -m cluster --durations=20 --durations-min=8 tests/slurm

# The server has an environment of its own, because its licence (CC BY-NC 4.0) forbids commercial use: installing it is
# your decision, and nothing else needs it.
test-wandb: $(INSTALLED)
	test -x .venv-wandb-server/bin/openwandb || $(PYTHON) -m venv .venv-wandb-server
	.venv-wandb-server/bin/python -m pip install --quiet openwandb==0.5.25
	$(RUN) -m pytest -m wandb tests/test_tracking_online.py

# The CUDA code on a CUDA that does nothing (tests/nullcuda/README.md). Downloads 5 GB at first use, and is no part of
# .ci/run for that reason.
test-null-gpu:
	tests/nullcuda/build.sh
	tests/nullcuda/run.sh python -m tests.nullcuda.check

# Once a release: what users get from `pip install`, next to no checkout.
test-wheel:
	PYTHON=$(PYTHON) tests/versions/wheel.sh runs/demo/64px

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The pages and figures that the code writes.
docs: $(INSTALLED)
	$(RUN) -m jitscale.train --list-settings > docs/settings.md
	$(RUN) docs/draw.py
	$(RUN) docs/reference.py > docs/reference.md

install: $(INSTALLED)

# PyTorch goes first and by itself, so that a local build is kept where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo
