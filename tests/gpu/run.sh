#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, after the build. From the project's root, after `make setup`.
#   1. the golden cases of networks in f32 and bf16; the conformance suite on NCCL, one member for each GPU; the fused operators compiled, and
#      proved beside libtorch's, and FP8 products; what each kind of number costs the demo's losses and gradient;
#   2. the demo for twenty steps in f32 by two workers: on the CPU over TCP, then on GPUs over NCCL (on one GPU, if there is only one), with
#      fused operators and with libtorch's, and with pictures encoded on a second stream: the adapters must be alike to rounding;
#   3. the same from latents and text that the GPU has computed beforehand;
#   4. three steps of the demo under compute-sanitizer, where that is installed;
#   5. all-reduces of the demo's gradient among the GPUs, if there are several;
#   6. a training step by its stages: of the published sizes with random weights, or of MODEL and STUDENT, if they name real models; the same
#      with one thing changed at a time; and what the autoencoder of MODEL loses on the pictures in the folder IMAGES, if there is one;
#   7. the step beside that of diffusers and PyTorch (PEER: a Python that has tests/peers/requirements.txt; `make bench-gpu` makes one): SDXL's
#      published sizes, 640x640, all samples parallel, plain and as the published trainer; then rows with 25 % native samples, with both
#      autoencoders in bf16, with the peer compiled, and with what the peer lacks: latents and text from the cache, FP8.
#
# PARTS="2 6" runs these alone. A part that fails, or one measurement of several, keeps none of the others from running; the script then ends
# with 1 and says which. BIN names a folder with `coordinator` and `worker` that are built already, on a machine that builds nothing: tests
# of part 1 are then left out.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! nvidia-smi -L; then
  echo "tests/gpu/run.sh: skipped: nvidia-smi finds no GPU on this machine" >&2
  exit 2
fi
export OMP_NUM_THREADS=1
if [[ -z ${PEAPOD_GPU_PART:-} ]]; then
  if [[ -z ${BIN:-} ]]; then
    cargo build --release --workspace
  fi
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  failed=
  for part in ${PARTS:-1 2 3 4 5 6 7}; do
    # A process of its own: in a function whose status is looked at, the shell goes on after errors.
    PEAPOD_GPU_PART=$part PEAPOD_GPU_OUT=$out bash tests/gpu/run.sh || failed+=" $part"
  done
  [[ -z $failed ]] || { echo "tests/gpu/run.sh: failed in part$failed" >&2; exit 1; }
  exit 0
fi
out=$PEAPOD_GPU_OUT
bin=${BIN:-target/release}
worker=$bin/worker

sed -e 's/^steps = .*/steps = 20\ndtype = "f32"/' -e 's/^\(path = "tests\/demo\/model"\)$/\1\nvae_dtype = "f32"/' \
  -e 's/^every_steps = .*/every_steps = 20/' tests/demo/job.toml >"$out/job.toml"
train() { # NAME JOB, then variables of the workers
  local name=$1 job=$2
  shift 2
  env "$@" "$bin/coordinator" --world-size 2 --local --job "$job" --state-dir "$out/$name"
}
train_on_gpu() { # likewise, once; TF32 would hide a wrong sum among its own rounding
  local name=$1 job=$2
  shift 2
  [[ -d $out/$name ]] || train "$name" "$job" PEAPOD_DEVICE=cuda PEAPOD_ALLOW_SHARED_GPU=true NVIDIA_TF32_OVERRIDE=0 "$@"
}

wanted() { [[ $PEAPOD_GPU_PART == "$1" ]]; }
failures=0
measure() { # a command: one measurement of several
  "$@" || { echo "-- failed: $*"; failures=$((failures + 1)); }
}

if wanted 1; then
  echo "== 1. conformance on NCCL, and the fused operators"
  golden=golden_networks_come_out_on_a_gpu
  if [[ -z ${BIN:-} ]]; then
    PEAPOD_GOLDEN_DEVICE=cuda cargo test --workspace --test stories -- $golden --nocapture
    # NCCL as `make setup` puts it; the tests of this crate know nothing of libtorch's folder.
    LD_LIBRARY_PATH=$PWD/.libtorch/nvidia/nccl/lib:${LD_LIBRARY_PATH:-} PEAPOD_NCCL=1 \
      cargo test -p peapod-collective --lib -- --test-threads=1 nccl:: --nocapture
    PEAPOD_NVRTC=1 cargo test --workspace --lib -- --test-threads=1 gpu::tests --nocapture
  else
    echo "skipped: the tests of NCCL and of kernels, which BIN does not hold"
    if [[ -x $bin/stories ]]; then
      PEAPOD_GOLDEN_DEVICE=cuda "$bin/stories" $golden --nocapture
    else
      echo "skipped: golden cases, as BIN holds no \`stories\` (target/debug/deps/stories-*, which finds the cases where it was built)"
    fi
  fi
  sed 's/^\[train\]/[train]\nfp8_linears = true/' tests/demo/job.toml >"$out/fp8.toml"
  $worker check --job "$out/fp8.toml" --device cuda | tee "$out/check"
  grep -q '^operators in bf16: fused' "$out/check"
  grep -q '^linear layers in FP8: proved' "$out/check"
  $worker loss-error --job tests/demo/job.toml --device cuda
fi

if wanted 2; then
  echo "== 2. the same adapter from TCP and from NCCL"
  train tcp "$out/job.toml" PEAPOD_DEVICE=cpu
  train_on_gpu nccl "$out/job.toml"
  python3 tests/gpu/compare_adapters.py "$out/tcp" "$out/nccl" 1e-3
  train_on_gpu plain "$out/job.toml" PEAPOD_KERNELS=plain
  python3 tests/gpu/compare_adapters.py "$out/plain" "$out/nccl" 1e-3
  train_on_gpu ahead "$out/job.toml" PEAPOD_ENCODE_AHEAD=true
  python3 tests/gpu/compare_adapters.py "$out/ahead" "$out/nccl" 1e-3
fi

if wanted 3; then
  echo "== 3. the same adapter from what was computed beforehand"
  NVIDIA_TF32_OVERRIDE=0 $worker precompute --job "$out/job.toml" --out "$out/shards" --text --device cuda
  sed "s#^shards = .*#shards = [\"$out/shards/{00000..00005}.tar\"]#" "$out/job.toml" >"$out/made.toml"
  train_on_gpu made "$out/made.toml"
  train_on_gpu nccl "$out/job.toml"
  python3 tests/gpu/compare_adapters.py "$out/nccl" "$out/made" 1e-3
fi

if wanted 4; then
  echo "== 4. memory accesses"
  if command -v compute-sanitizer >/dev/null; then
    # Without libtorch's cache each tensor has a memory of its own, beyond which an access is seen. Calls that libraries expect to fail are none.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $worker bench --device cuda --batch 2 --steps 3 --warmup 0 --peak-time 0s
  else
    echo "skipped: compute-sanitizer is not installed"
  fi
fi

if wanted 5; then
  echo "== 5. the links"
  if [[ $(nvidia-smi -L | wc -l) -gt 1 ]]; then
    $worker check --job tests/demo/job.toml --device cuda --bandwidth
  else
    echo "skipped: one GPU has nobody to sum with"
  fi
fi

if wanted 6; then
  echo "== 6. a step by its stages"
  models=(--published sdxl)
  if [[ -n ${MODEL:-} && -n ${STUDENT:-} ]]; then
    models=(--model "$MODEL" --student "$STUDENT" --context-length 52 --size 640 640)
  fi
  step() { # what is changed
    echo "-- ${*:-as it comes}"
    measure $worker bench --device cuda --batch 10 --steps 20 --warmup 5 "${models[@]}" --peak-time "${peak:-0s}" "$@"
  }
  peak=10s step
  step --kernels plain
  step --vae-dtype tf32
  step --vae-dtype f32
  step --attention flash
  step --attention efficient
  step --cudnn-benchmark
  step --encode-ahead
  step --precomputed
  step --gradient-checkpointing
  step --fp8-linears
  step --dtype f16
  measure $worker bench --device cuda --published sd15 --batch 40 --steps 20 --warmup 5 --peak-time 10s
  if [[ -n ${MODEL:-} && -n ${IMAGES:-} ]]; then
    measure $worker vae-error --device cuda --model "$MODEL" --images "$IMAGES" --size 640 640
  else
    echo "the autoencoder's error: skipped, MODEL and IMAGES name no model and no folder of pictures"
  fi
fi

if wanted 7; then
  echo "== 7. beside diffusers and PyTorch"
  if [[ -n ${PEER:-} ]]; then
    beside() {
      echo "-- ${*:-plain}"
      measure "$PEER" tests/peers/bench_step.py $worker --published sdxl --device cuda --steps 20 --rounds 3 "$@"
    }
    beside --batch 10
    beside --batch 10 --reference
    # Each program's best: the largest of its medians over these. One that does not fit either is no failure.
    before=$failures
    for batch in 20 40 64; do
      beside --batch $batch
    done
    failures=$before
    beside --batch 12 --native 3
    beside --batch 10 --encode-ahead
    beside --batch 10 --vae-dtype bf16
    beside --batch 10 --precomputed
    beside --batch 10 --fp8-linears
    # The peer's compiler needs a C compiler and Python's headers.
    beside --batch 10 --compile
  else
    echo "skipped: PEER names no Python with tests/peers/requirements.txt"
  fi
fi
[[ $failures == 0 ]]
