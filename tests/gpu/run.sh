#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, in about ten minutes after the build. From the project's root, after `make setup`.
#   1. the conformance suite on NCCL, one member for each GPU;
#   2. the demo for twenty steps in f32 by two workers: on the CPU over TCP, then on GPUs over NCCL (on one GPU, if there is only one):
#      the adapters must be alike to rounding;
#   3. three steps of the demo under compute-sanitizer, where that is installed;
#   4. a training step by its stages. MODEL and STUDENT may name real models; without them it is the demo's.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! nvidia-smi -L; then
  echo "tests/gpu/run.sh: skipped: nvidia-smi finds no GPU on this machine" >&2
  exit 2
fi
export OMP_NUM_THREADS=1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --workspace
worker=target/release/worker

echo "== 1. conformance on NCCL"
cargo test --workspace --lib -- --test-threads=1 nccl:: --nocapture

echo "== 2. the same adapter from TCP and from NCCL"
sed -e 's/^steps = .*/steps = 20\ndtype = "f32"/' -e 's/^\(path = "tests\/demo\/model"\)$/\1\nvae_dtype = "f32"/' \
  -e 's/^every_steps = .*/every_steps = 20/' tests/demo/job.toml >"$out/job.toml"
train() { # NAME, then variables of the workers
  local name=$1
  shift
  env "$@" target/release/coordinator --world-size 2 --local --job "$out/job.toml" --state-dir "$out/$name"
}
train tcp PEAPOD_DEVICE=cpu
# TF32 would hide a wrong sum among its own rounding.
train nccl PEAPOD_DEVICE=cuda PEAPOD_ALLOW_SHARED_GPU=true NVIDIA_TF32_OVERRIDE=0
python3 tests/gpu/compare_adapters.py "$out/tcp" "$out/nccl" 1e-3

echo "== 3. memory accesses"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 1 $worker bench --device cuda --batch 2 --steps 3 --warmup 0 --peak-time 0s
else
  echo "skipped: compute-sanitizer is not installed"
fi

echo "== 4. a step by its stages"
models=()
if [[ -n ${MODEL:-} && -n ${STUDENT:-} ]]; then
  models=(--model "$MODEL" --student "$STUDENT" --context-length 52 --size 640 640)
fi
for numbers in bf16 f16; do
  $worker bench --device cuda --dtype $numbers --batch 10 --steps 20 --warmup 5 --peak-time 10s "${models[@]}"
done
