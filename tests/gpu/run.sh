#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, after the build. From the project's root, after `make setup`.
#   1. the golden cases of networks in f32 and bf16; the conformance suite on NCCL, one member for each GPU; kernels, graphs and the second
#      stream; the fused operators compiled, and proved beside libtorch's, and FP8 products; what each kind of number costs the demo's losses
#      and gradient;
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
#   PARTS="2 6"  runs these alone.
#   BRIEF=1      leaves of parts 6 and 7 what says most, in fewer steps, and one round: a few minutes each instead of an hour for both.
#   BIN=FOLDER   holds `coordinator` and `worker` that are built already, for a machine that builds nothing; and, so that part 1 can run them,
#                the tests `stories`, `peapod_collective` and `peapod_kernels` (target/*/deps/NAME-*, under these names). `stories` finds the
#                golden cases under the path where it was built.
#
# A part that fails, or one measurement of several, keeps none of the others from running; the script then ends with 1 and says which.
# Nothing waits for ever: what hangs is ended, and NCCL's log shown.
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
  for part in ${PARTS:-1 2 3 5 6 7 4}; do
    # A process of its own: in a function whose status is looked at, the shell goes on after errors.
    began=$SECONDS
    PEAPOD_GPU_PART=$part PEAPOD_GPU_OUT=$out bash tests/gpu/run.sh || failed+=" $part"
    echo "== part $part took $((SECONDS - began)) s"
  done
  [[ -z $failed ]] || { echo "tests/gpu/run.sh: failed in part$failed" >&2; exit 1; }
  exit 0
fi
out=$PEAPOD_GPU_OUT
bin=${BIN:-target/release}
worker=$bin/worker
steps=20 rounds=3 warmup=5
[[ -z ${BRIEF:-} ]] || steps=8 rounds=1 warmup=3

wanted() { [[ $PEAPOD_GPU_PART == "$1" ]]; }
detailed() { [[ -z ${BRIEF:-} ]]; }
within() { # SECONDS, and a command
  timeout --kill-after=10 "$@" || { local status=$?; [[ $status != 124 ]] || echo "-- ended after $1 s: ${*:2}" >&2; return $status; }
}
failures=0
attempt() { # a command: one of several, of which none keeps the others from running
  "$@" || { echo "-- failed: $*"; failures=$((failures + 1)); }
}
measure() { # SECONDS, and such a command
  attempt within "$@"
}

sed -e "s/^steps = .*/steps = 20\ndtype = \"f32\"/" -e 's/^\(path = "tests\/demo\/model"\)$/\1\nvae_dtype = "f32"/' \
  -e 's/^every_steps = .*/every_steps = 20/' tests/demo/job.toml >"$out/job.toml"
train() { # NAME JOB, then variables of the workers
  local name=$1 job=$2
  shift 2
  within 150 env NCCL_DEBUG=INFO NCCL_DEBUG_FILE="$out/$name.nccl.%p" "$@" \
    "$bin/coordinator" --world-size 2 --local --job "$job" --state-dir "$out/$name" 2>&1 | tee "$out/$name.log" || {
    tail -n 15 "$out/$name".nccl.* 2>/dev/null
    return 1
  }
  touch "$out/$name.done"
}
train_on_gpu() { # likewise, once; TF32 would hide a wrong sum among its own rounding
  local name=$1 job=$2
  shift 2
  [[ -e $out/$name.done ]] || train "$name" "$job" PEAPOD_DEVICE=cuda PEAPOD_ALLOW_SHARED_GPU=true NVIDIA_TF32_OVERRIDE=0 "$@"
}

# The workers open libtorch's CUDA part themselves; tests are given it.
cuda_library() {
  local folder
  for folder in .libtorch/torch/lib $(tr : " " <<<"${LD_LIBRARY_PATH:-}"); do
    [[ ! -e $folder/libtorch_cuda.so ]] || { realpath "$folder/libtorch_cuda.so"; return; }
  done
  echo "libtorch_cuda.so is neither in .libtorch nor on LD_LIBRARY_PATH" >&2
  return 1
}
test_program() { # NAME PACKAGE: a built test
  if [[ -n ${BIN:-} ]]; then
    if [[ -x $BIN/$1 ]]; then echo "$BIN/$1"; else echo "skipped: tests of $1, which $BIN does not hold" >&2; fi
  else
    cargo test --workspace --no-run --message-format json 2>/dev/null |
      python3 -c "import json, sys
found = [m['executable'] for m in map(json.loads, sys.stdin) if m.get('profile', {}).get('test') and m['target']['name'] == '$1']
print(found[-1])"
  fi
}
run_tests() { # NAME, then variables, `--` and arguments
  local program variables=()
  program=$(test_program "$1")
  [[ -n $program ]] || return 0
  shift
  while [[ $1 != -- ]]; do variables+=("$1"); shift; done
  shift
  measure 240 env "${variables[@]}" "$program" "$@" --nocapture
}

if wanted 1; then
  echo "== 1. golden cases, conformance on NCCL, kernels, and the fused operators"
  cuda=$(cuda_library)
  # NCCL as `make setup` puts it; the tests of that crate know nothing of libtorch's folder.
  nccl=$PWD/.libtorch/nvidia/nccl/lib:${LD_LIBRARY_PATH:-}
  run_tests peapod_kernels LD_PRELOAD="$cuda" PEAPOD_NVRTC=1 -- --test-threads=1
  run_tests peapod_collective LD_LIBRARY_PATH="$nccl" PEAPOD_NCCL=1 -- --test-threads=1 nccl::
  run_tests stories PEAPOD_GOLDEN_DEVICE=cuda -- golden_networks_come_out_on_a_gpu
  sed 's/^\[train\]/[train]\nfp8_linears = true/' tests/demo/job.toml >"$out/fp8.toml"
  check() { # JOB, then what its report must say
    local report
    report=$(within 120 "$worker" check --job "$1" --device cuda) || echo "-- failed: check --job $1"
    echo "$report"
    for line in "${@:2}"; do grep -q "^$line" <<<"$report" || { echo "-- not said by \`check\`: $line"; failures=$((failures + 1)); }; done
  }
  check "$out/fp8.toml" "operators in bf16: fused" "linear layers in FP8: proved"
  for kind in f32 f16; do
    sed -e "s/^dtype = .*//" -e "s/^\[train\]/[train]\ndtype = \"$kind\"/" tests/demo/job.toml >"$out/$kind.toml"
    check "$out/$kind.toml" "operators in $kind: fused"
  done
  within 180 "$worker" loss-error --job tests/demo/job.toml --device cuda --json >"$out/errors.json" || failures=$((failures + 1))
  cat "$out/errors.json"
  if grep '"problem": "' "$out/errors.json"; then
    echo "-- a kind of number does not train on this GPU"
    failures=$((failures + 1))
  fi
fi

if wanted 2; then
  echo "== 2. the same adapter from TCP and from NCCL"
  alike() { measure 60 python3 tests/gpu/compare_adapters.py "$out/$1" "$out/$2" 1e-3; }
  attempt train tcp "$out/job.toml" PEAPOD_DEVICE=cpu
  attempt train_on_gpu nccl "$out/job.toml"
  alike tcp nccl
  attempt train_on_gpu plain "$out/job.toml" PEAPOD_KERNELS=plain
  alike plain nccl
  attempt train_on_gpu ahead "$out/job.toml" PEAPOD_ENCODE_AHEAD=true
  if grep "doing it ahead failed" "$out/ahead.log"; then
    failures=$((failures + 1))
  fi
  alike ahead nccl
fi

if wanted 3; then
  echo "== 3. the same adapter from what was computed beforehand"
  NVIDIA_TF32_OVERRIDE=0 within 180 "$worker" precompute --job "$out/job.toml" --out "$out/shards" --text --device cuda
  sed "s#^shards = .*#shards = [\"$out/shards/{00000..00005}.tar\"]#" "$out/job.toml" >"$out/made.toml"
  attempt train_on_gpu made "$out/made.toml"
  attempt train_on_gpu nccl "$out/job.toml"
  measure 60 python3 tests/gpu/compare_adapters.py "$out/nccl" "$out/made" 1e-3
fi

if wanted 4; then
  echo "== 4. memory accesses"
  if command -v compute-sanitizer >/dev/null; then
    # Without libtorch's cache each tensor has a memory of its own, beyond which an access is seen. Calls that libraries expect to fail are none.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 900 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
      "$worker" bench --device cuda --batch 2 --steps 3 --warmup 0 --peak-time 0s
  else
    echo "skipped: compute-sanitizer is not installed"
  fi
fi

if wanted 5; then
  echo "== 5. the links"
  if [[ $(nvidia-smi -L | wc -l) -gt 1 ]]; then
    within 180 "$worker" check --job tests/demo/job.toml --device cuda --bandwidth
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
    measure 300 "$worker" bench --device cuda --batch 10 --steps $steps --warmup $warmup "${models[@]}" --peak-time "${peak:-0s}" "$@"
  }
  peak=10s step
  step --kernels plain
  step --encode-ahead
  step --fp8-linears
  if detailed; then
    step --vae-dtype tf32
    step --vae-dtype f32
    step --attention flash
    step --attention efficient
    step --cudnn-benchmark
    step --precomputed
    step --gradient-checkpointing
    step --dtype f16
    measure 300 "$worker" bench --device cuda --published sd15 --batch 40 --steps $steps --warmup $warmup --peak-time 10s
  fi
  if [[ -n ${MODEL:-} && -n ${IMAGES:-} ]]; then
    measure 300 "$worker" vae-error --device cuda --model "$MODEL" --images "$IMAGES" --size 640 640
  else
    echo "the autoencoder's error: skipped, MODEL and IMAGES name no model and no folder of pictures"
  fi
fi

if wanted 7; then
  echo "== 7. beside diffusers and PyTorch"
  if [[ -n ${PEER:-} ]]; then
    beside() {
      echo "-- ${*:-plain}"
      measure 900 "$PEER" tests/peers/bench_step.py "$worker" --published sdxl --device cuda --steps $steps --rounds $rounds "$@"
    }
    beside --batch 10
    beside --batch 10 --reference
    if detailed; then
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
    fi
  else
    echo "skipped: PEER names no Python with tests/peers/requirements.txt"
  fi
fi
[[ $failures == 0 ]]
