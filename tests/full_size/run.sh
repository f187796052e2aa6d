#!/usr/bin/env bash
# SDXL and Chinese-CLIP in their published sizes, with random weights in their published layouts: checked, trained and drawn with on the CPU, by
# the job file that deploy/ ships. Needs 14 GB of memory, 8 GB of disk for the models, and .bench/venv (`make full-size` makes it).
# usage: tests/full_size/run.sh [DIR]      DIR: built programs [target/release]
set -euo pipefail
cd "$(dirname "$0")/../.."
programs=${1:-target/release}
models=.bench/full-size
export PEAPOD_DEVICE=cpu

say() { echo "full size: $*"; }
if [[ ! -e $models/.made ]]; then
  rm -rf $models
  .bench/venv/bin/python tests/full_size/make_model.py $models
  mkdir $models/shards
  .bench/venv/bin/python tests/peers/make_photo_shards.py $models/shards 2 12 1
  touch $models/.made
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
job=(--job deploy/jobs/sdxl-chinese.toml --set model.path=$models/sdxl --set student.path=$models/chinese-clip
  --set "data.shards=[\"$models/shards/{00000..00001}.tar\"]" --set train.global_batch=2 --set train.micro_batch=1
  --set train.warmup_steps=0 --set train.dtype=bf16)
"$programs/coordinator" check "${job[@]}" --set train.steps=1
"$programs/worker" check "${job[@]}" --set train.steps=1

train() { # as far as this step
  "$programs/coordinator" --local --world-size 1 --http-addr off --state-dir "$work/state" "${job[@]}" --set train.steps="$1" 2>&1 | tee "$work/log"
  # A step is a line of JSON.
  python3 - "$work/state/steps.jsonl" "$1" <<'PYTHON'
import json, math, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
assert [step["step"] for step in steps] == list(range(1, int(sys.argv[2]) + 1)), steps
assert all(math.isfinite(step[loss]) for step in steps for loss in ("task", "logit", "feature")), steps
PYTHON
}
train 1
# Another start goes on from the checkpoint.
train 2
grep -q 'workers train from step 1 (from its checkpoint)' "$work/log"
say "two steps trained, the second after a new start"

"$programs/sample" --model $models/sdxl --adapter "$work/state/checkpoints" --prompt "红色的圆形" --steps 2 --width 512 \
  --height 512 --dtype bf16 --out "$work/picture.png"
say "a picture drawn: $(file -b "$work/picture.png" 2>/dev/null || stat -c '%s bytes' "$work/picture.png")"
