# What a newcomer types. Every target first makes sure of the set-up, which returns at once when nothing changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup paper test smoke verify bench docker clean

PYTHON_ENV := .venv/bin/python
SNAKEMAKE := $(PYTHON_ENV) -m snakemake
SMOKE := --configfile workflow/config/smoke.yaml
DOCKER ?= docker
BASE_IMAGE ?= debian:bookworm-slim

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: ## .venv from requirements.lock, mango installed editable, LaTeX available
	@bash workflow/scripts/setup.sh

paper: setup ## every experiment at laptop scale -> paper/build/mango.pdf, results/laptop/, report.html (half an hour on 2 cores)
	$(SNAKEMAKE)
	@[ report.html -nt paper/build/mango.pdf ] || $(SNAKEMAKE) --report report.html --quiet all
	@echo "paper/build/mango.pdf  report.html  results/laptop/"

test: setup ## the whole test suite but the slow ones (a file stays on one worker, so that its fixtures are made once)
	$(PYTHON_ENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

smoke: setup ## every rule on tiny inputs (minutes) -> paper/build/smoke/mango.pdf, results/smoke/
	$(SNAKEMAKE) $(SMOKE)
	@[ results/smoke/report.html -nt paper/build/smoke/mango.pdf ] || $(SNAKEMAKE) $(SMOKE) --report results/smoke/report.html --quiet all
	@echo "paper/build/smoke/mango.pdf  results/smoke/report.html  results/smoke/"

verify: setup ## the laptop tier's numbers against the committed reference values
	$(PYTHON_ENV) workflow/scripts/verify.py laptop

bench: setup ## codecs and optimizers against their peers, timed in one process
	.venv/bin/mango bench codecs
	.venv/bin/mango bench optimizers

docker: ## the container image (BASE_IMAGE=... for CUDA)
	$(DOCKER) build --build-arg BASE_IMAGE=$(BASE_IMAGE) --tag mango .

clean: ## remove what the workflow made; .venv, the data cache, results/archive and results/reference stay
	rm -rf .snakemake logs paper/build paper/generated report.html
	find results -mindepth 1 -maxdepth 1 ! -name archive ! -name reference -exec rm -rf {} +
