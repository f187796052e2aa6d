# `make demo` shows everything at once; `make help` lists the rest.
SHELL := bash
.PHONY: help setup build demo test lint fmt clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install libtorch into .libtorch (once)
	@deploy/setup/libtorch.sh .libtorch

build: setup ## build every program
	cargo build --workspace

demo: build ## train the demo adapter with two workers on this machine, then draw with it (about four minutes after the build)
	rm -rf demo-out
	target/debug/coordinator --world-size 2 --local --job tests/demo/job.toml --state-dir demo-out/state
	target/debug/sample --model tests/demo/model --adapter demo-out/state/checkpoints \
	  --compare --prompts tests/demo/prompts.tsv --steps 20 --guidance 5 --seed 7 --title "Peapod demo" --out demo-out/demo.png
	@echo "picture     demo-out/demo.png"

# Pools of several threads would spin against each other: the tests run side by side.
test: export OMP_NUM_THREADS = 1
test: build ## all tests that need no GPU, no root and no other host
	cargo test --workspace
	cargo test --workspace --test stories -- --ignored --exact demo::trained_adapter_draws_what_chinese_prompts_name --nocapture

lint: setup ## formatting and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## format the code
	cargo fmt --all

clean: ## remove build products and the demo's output (not libtorch)
	cargo clean
	rm -rf demo-out
