# `make help` lists what there is to do. Everything runs in .venv, which `make env` keeps up to date.

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p))))
RUN := .venv/bin/python
TYPED := python/kunserve_sglang scripts $(if $(wildcard benchmark/*.py),benchmark)

.DEFAULT_GOAL := help
.PHONY: help env wheels manifests site demo endurance test browser lint types format freeze clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## create or update .venv (DEVICE=cuda: for GPUs)
	@$(PYTHON) scripts/setup_env.py $(if $(DEVICE),--device $(DEVICE))

wheels: env ## build into dist/ what installs without a checkout
	@$(RUN) scripts/build_wheels.py

manifests: env ## write deploy/kubernetes anew from the Helm chart
	@$(RUN) scripts/render_manifests.py

site: env ## build the documents as a site into build/site
	@$(RUN) -m mkdocs build

demo: env ## a burst on two instances, with and without KunServe
	@$(RUN) -m benchmark.demo $(ARGS)

endurance: env ## two hours of random load, transitions and deaths (ARGS="--minutes 20" for fewer)
	@$(RUN) -m benchmark.endurance --minutes 120 $(ARGS)

# What runs several schedulers mostly waits: for processes that start, for limits that pass. So two
# files of it run at a time, each with the clusters that its tests share.
test: env ## run the tests (ARGS="-k name" to choose)
ifdef ARGS
	@$(RUN) -m pytest $(ARGS)
else
	@$(RUN) -m pytest -n 2 --dist worksteal -m "not all_cores"
	@$(RUN) -m pytest -n 2 --dist loadfile -m "all_cores and not undisturbed"
	@$(RUN) -m pytest -m undisturbed
endif

browser: ## install what the tests of the dashboard need: Debian's Chromium (as root)
	@command -v chromium || (apt-get update && apt-get install -y --no-install-recommends chromium)

lint: env ## check style, types and who imports whom
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@.venv/bin/lint-imports --no-logo
	@$(MAKE) --no-print-directory types

types: env ## check types only
	@$(RUN) -m mypy $(TYPED)

format: env ## format the code and sort its imports
	@$(RUN) -m ruff check --select I --fix --quiet .
	@$(RUN) -m ruff format .

freeze: env ## write down the versions in .venv as the tested ones
	@$(RUN) scripts/freeze.py

clean: ## remove what was built and installed
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
