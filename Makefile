# `make demo` shows everything at once; `make help` lists the rest.
SHELL := bash
.PHONY: help setup build install demo test test-all full-size soak bench bench-gpu cold-start fuzz man lint lint-deps fmt clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install libtorch into .libtorch (once)
	@deploy/setup/libtorch.sh .libtorch

build: setup ## build every program
	cargo build --workspace

PREFIX := /opt/peapod

install: ## install what `cargo build --release --workspace` built, and libtorch, for deploy/systemd and deploy/slurm: PREFIX (/opt/peapod), DESTDIR
	@deploy/setup/install.sh programs target/release $(DESTDIR)$(PREFIX) coordinator worker sample
	@deploy/setup/install.sh libtorch .libtorch $(DESTDIR)$(PREFIX)

man: build ## write manual pages of all programs to target/man: MANPATH=target/man man coordinator
	@for program in coordinator worker sample; do target/debug/$$program man --out target/man/man1; done && ls target/man/man1

# Two workers need no GPU for it, and would need two.
demo: export PEAPOD_DEVICE ?= cpu
demo: build ## train the demo adapter with two workers on this machine, then draw with it (about two minutes after the build)
	rm -rf demo-out
	target/debug/coordinator --world-size 2 --local --job tests/demo/job.toml --state-dir demo-out/state
	target/debug/sample --model tests/demo/model --adapter demo-out/state/checkpoints \
	  --compare --prompts tests/demo/prompts.tsv --scheduler dpm++ --steps 20 --guidance 5 --seed 7 --title "Peapod demo" --out demo-out/demo.png
	@echo "picture     demo-out/demo.png"

# Pools of several threads would spin against each other: the tests run side by side. So would their workers for a GPU.
test: export OMP_NUM_THREADS = 1
test: export PEAPOD_DEVICE = cpu
test: build .bench/manifests/.installed ## all tests that need no GPU, no root and no other host
	cargo test --workspace
	cargo test --workspace --test stories -- --ignored --exact demo::trained_adapter_draws_what_chinese_prompts_name --nocapture

# NVIDIA's compiler of kernels needs no GPU (110 MB, beside libtorch, where a full setup has it).
.libtorch/nvidia/cu13/lib/libnvrtc.so.13: | setup
	.libtorch.tools/bin/uv pip install --quiet --python .libtorch.tools/bin/python --target .libtorch --no-deps nvidia-cuda-nvrtc==13.0.88

test-all: export OMP_NUM_THREADS = 1
test-all: test lint-deps .libtorch/nvidia/cu13/lib/libnvrtc.so.13 ## all tests, with many more random worlds, and what the programs are made of
	PROPTEST_CASES=10000 cargo test --workspace --lib -- exactly_once replay
	cargo test --workspace --test stories -- --ignored --exact simulation::clusters_of_twenty_thousand_seeds_lose_and_double_no_sample --nocapture
	@test $$(id -u) != 0 && echo "full disk: skipped, it mounts a file system and needs root" || \
	  cargo test --workspace --test stories -- --ignored --exact restart::full_disk_costs_checkpoints_and_no_sample --nocapture
	cargo test --workspace --test stories -- --ignored --exact observability::page_is_whole_in_a_browser_at_both_widths_and_in_both_colours --nocapture
	PEAPOD_NVRTC=1 cargo test --workspace --lib -- kernels_compile_for_every_generation_in_every_kind
	cargo test -p peapod-proto --features otlp --test otlp
	tests/stores/run.sh
	tests/containers/run.sh

full-size: setup .bench/.installed ## SDXL and Chinese-CLIP in full size (random weights, 8 GB of disk, 14 GB of memory): check, two steps on the CPU, a picture
	cargo build --release --workspace
	tests/full_size/run.sh target/release

# The schemas that the manifests in deploy/ are checked against (140 MB), once. Without them those stories skip.
.bench/manifests/.installed: tests/manifests/requirements.txt
	@python3 -m venv .bench/manifests && .bench/manifests/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@ || \
	  { rm -rf .bench/manifests; echo "manifests: kubernetes-validate cannot be installed: deploy/ is not checked against Kubernetes' schemas"; }

PEAPOD_SOAK_SECONDS := 600

soak: export OMP_NUM_THREADS = 1
soak: build ## the demo job under a random fault every few seconds, then three times without: PEAPOD_SOAK_SECONDS (600), PEAPOD_SOAK_SEED
	PEAPOD_SOAK_SECONDS=$(PEAPOD_SOAK_SECONDS) cargo test --workspace --test stories -- --ignored --exact --nocapture \
	  soak::demo_job_under_random_faults_trains_each_sample_of_each_epoch_once_and_as_well_as_without_them

BENCH_CORES := 2
BENCH_ROUNDS := 5
# A fault takes a minute where the peer does not recover.
BENCH_FAULT_ROUNDS := 3
BENCH_RANKS := 4

bench: .bench/.installed ## time the coordinator with 400,000 shards, and the loader, `sample`, a training step and recovery beside their Python peers, on an otherwise idle machine: BENCH_CORES (2), BENCH_ROUNDS (5), BENCH_FAULT_ROUNDS (3), BENCH_RANKS (4)
	cargo run --release -p peapod-coordinator --example shards_at_scale
	cargo build --release -p peapod-data --example loader_throughput
	cargo build --release -p peapod-worker --bins
	cargo build --release -p peapod-coordinator --bins --example workers_at_scale
	.bench/venv/bin/python tests/peers/bench_loader.py target/release/examples/loader_throughput .bench/shards \
	  --cores $(BENCH_CORES) --rounds $(BENCH_ROUNDS)
	.bench/venv/bin/python tests/peers/bench_draw.py target/release/sample tests/demo/model --threads $(BENCH_CORES) --rounds $(BENCH_ROUNDS)
	.bench/venv/bin/python tests/peers/bench_scale.py target/release/examples/workers_at_scale target/release/coordinator --rounds $(BENCH_ROUNDS)
	.bench/venv/bin/python tests/peers/bench_step.py target/release/worker tests/demo/model --threads $(BENCH_CORES) --rounds $(BENCH_ROUNDS)
	.bench/venv/bin/python tests/peers/bench_recovery.py target/release/coordinator target/release/worker \
	  --ranks $(BENCH_RANKS) --rounds $(BENCH_FAULT_ROUNDS)

bench-gpu: ## time a training step on the GPU by its stages and beside its Python peer, after the tests that need one; MODEL and STUDENT name real models, else published sizes with random weights
	@command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || { echo "bench-gpu: skipped: this machine has no NVIDIA GPU"; exit 0; } && \
	  $(MAKE) --no-print-directory .bench/.installed && PEER=.bench/venv/bin/python tests/gpu/run.sh

cold-start: ## time README's two commands and `make test` by part, in a fresh clone without caches (15 GB, half an hour)
	@tests/cold_start.sh

# The peer's packages (6 GB with the libraries torch brings along), once.
.bench/.installed: tests/peers/requirements.txt
	python3 -m venv .bench/venv
	.bench/venv/bin/pip install --quiet --disable-pip-version-check uv
	.bench/venv/bin/uv pip install --quiet --python .bench/venv/bin/python -r tests/peers/requirements.txt
	touch $@

FUZZ_MODEL := torch_file safetensors_file sentencepiece adapter_file
FUZZ_DATA := tar picture json_sample shard_list cached
FUZZ_COORDINATOR := request worker_stream join_string
FUZZ_SECONDS := 60

fuzz: setup ## look for inputs that crash the readers of foreign files and of what comes over the network: FUZZ_SECONDS (60) for each reader, not counting the build
	@command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing; install it (a C++ compiler is needed too): cargo install cargo-fuzz" >&2; exit 2; }
	@for target in $(FUZZ_MODEL:%=worker/model/%) $(FUZZ_DATA:%=worker/data/%) $(FUZZ_COORDINATOR:%=coordinator/%); do \
	  cd $(CURDIR)/$${target%/*} && target=$${target##*/} && mkdir -p fuzz/found/$$target && \
	  cargo fuzz run --sanitizer none $$target fuzz/found/$$target fuzz/corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 || exit 1; \
	done

lint: setup ## formatting and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

lint-deps: ## licences, sources and banned crates of all dependencies, and those nobody uses: cargo-deny and cargo-machete, where they are installed
	@command -v cargo-deny >/dev/null || { echo "lint-deps: licences not checked: cargo-deny is missing (cargo install cargo-deny)"; exit 0; } && \
	  cargo deny --all-features check --hide-inclusion-graph bans licenses sources
	@command -v cargo-machete >/dev/null || { echo "lint-deps: unused crates not looked for: cargo-machete is missing (cargo install cargo-machete)"; exit 0; } && \
	  cargo machete --skip-target-dir

fmt: ## format the code
	cargo fmt --all

clean: ## remove build products and the demo's output (not libtorch)
	cargo clean
	rm -rf demo-out
