# `make demo` is the two-minute tour; `make help` lists the rest.
SHELL := bash
.PHONY: help setup build demo test lint fmt clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install libtorch into .libtorch (once)
	@deploy/setup/libtorch.sh .libtorch

build: setup ## build every program
	cargo build --workspace

lint: setup ## formatting and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## format the code
	cargo fmt --all

clean: ## remove build products and the demo's output (not libtorch)
	cargo clean
	rm -rf demo-out
