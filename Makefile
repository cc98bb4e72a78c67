# The commands of this project; `make` lists them. Set-up is part of each command and is reused.
PYTHON ?= python3
export PYTHON
BIN := .venv/bin
# The quick check needs no torch: it takes the whole environment if that is there, else one of its own.
CHECK := $(if $(wildcard .venv/.dev),.venv,.venv-check)
UV := uv==0.13.9

# What a test needs beyond Python, as markers: see pyproject.toml.
QUICK := not model and not process and not postgres and not server and not image

# Some tests hold a limit of time or memory, and several processes share the cores: what fails there must
# pass alone. Status 1 means that tests failed, and nothing else.
or_alone = || { [ $$? = 1 ] && echo "The tests that failed run once more, one at a time." && \
	$(1) --last-failed --last-failed-no-failures none $(ARGS); }

.DEFAULT_GOAL := help
.PHONY: help demo check test smoke soak fuzz guards bench gpu-kit gpu-check image-test lint lab docs showcase export readme lock clean
.NOTPARALLEL:

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r n t; \
		do printf '  make %-10s %s\n' "$$n" "$$t"; done

demo: .venv/.worker ## set up, start the worker here, send it one signed photograph, print the answer
	@$(BIN)/python -m heimdex_clip_worker.cli.main demo $(ARGS)

check: $(CHECK)/.check ## lint, import rules and the tests that need neither torch nor a server
	@$(CHECK)/bin/ruff check .
	@$(CHECK)/bin/lint-imports --no-logo
	@FUZZ_EXAMPLES=50 $(CHECK)/bin/python -m pytest -n 2 -q -m "$(QUICK)" $(ARGS) $(call or_alone,$(CHECK)/bin/python -m pytest -m "$(QUICK)")

test: .venv/.dev ## set up and run the notebooks' cells and tests/, with one count
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS) $(call or_alone,$(BIN)/python -m pytest)

smoke: .venv/.dev ## run the smoke-test notebook with papermill against a worker started here
	@$(BIN)/python tests/smoke.py $(ARGS)

soak: .venv/.dev ## send one worker 10 000 good and hostile requests; nothing may leak
	@$(BIN)/python tests/hostile/soak.py $(ARGS)

fuzz: .venv/.dev ## decode a million mutated images; only declared errors may come out
	@$(BIN)/python tests/hostile/fuzz.py $(or $(ARGS),--count 1000000)

guards: .venv/.dev ## take each guard out in turn and see which test notices
	@$(BIN)/python tests/hostile/remove_guards.py $(ARGS)

bench: .venv/.dev ## measure against two baseline workers (11 to 12 minutes)
	@$(BIN)/python -m benchmarks.bench $(ARGS)

gpu-kit: $(CHECK)/.check ## gather what a bare CUDA machine lacks, to run tools/gpu_check.sh there
	@$(CHECK)/bin/python tools/gpu_kit.py $(ARGS)

gpu-check: .venv/.dev ## prove and measure everything on this machine's GPU (up to 9 minutes)
	@KIT=none PYTHON=$(BIN)/python bash tools/gpu_check.sh $(or $(ARGS),benchmarks/results)

image-test: .venv/.dev ## build the image without Docker and let it answer (root, 30 GB, 10 to 30 minutes)
	@$(BIN)/python tools/image_test.py $(ARGS)

lint: .venv/.dev ## check the code, in notebooks too, with ruff
	@$(BIN)/ruff check .

lab: .venv/.dev ## open the exploration notebook in JupyterLab
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/21_explore.ipynb $(ARGS)

showcase: .venv/.dev ## run the notebooks that are committed with their outputs, and store these
	@$(BIN)/python tools/showcase.py $(ARGS)

docs: .venv/.dev ## serve the documentation site; ARGS=--build builds it strictly into _site/
	@$(BIN)/python tools/docs.py $(ARGS)

export: .venv/.dev ## write the package from the notebooks, clean them, and render README and reference
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/notebooks.py nbs
	@$(BIN)/python tools/reference.py
	@$(BIN)/python tools/readme.py

readme: .venv/.dev ## render README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

lock: .cache/lock/.ready ## pin the newest allowed versions in the requirements files
	@PATH=".cache/lock/bin:$$PATH" .cache/lock/bin/python tools/lock.py

clean: ## remove what was set up and built (.venv too)
	@rm -rf .venv .venv-check .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.worker: requirements.txt settings.ini setup.py
	@tools/setup.sh worker

.venv/.dev: .venv/.worker requirements-dev.txt
	@tools/setup.sh dev

.venv/.check: .venv/.dev
	@touch $@

.venv-check/.check: requirements-check.txt settings.ini setup.py
	@tools/setup.sh check

.cache/lock/.ready: Makefile
	@rm -rf .cache/lock && "$(PYTHON)" -m venv .cache/lock
	@.cache/lock/bin/python -m pip install -qq --disable-pip-version-check $(UV) && touch $@
