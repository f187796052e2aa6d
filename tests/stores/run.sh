#!/usr/bin/env bash
# The demo from a store of objects into a store of objects: shards and checkpoints in S3, as the moto server speaks it. Builds the programs
# with that store's feature first, beside the others.
# usage: tests/stores/run.sh [DIR]      DIR: programs that were built so [they are built into target/stores]
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "stores: $*"; }
fail() {
  say "FAILED: $*" >&2
  tail -n 30 "$work"/*.log >&2 || true
  exit 1
}

venv=.bench/stores
if [ ! -e $venv/.installed ]; then
  # shellcheck disable=SC2015
  python3 -m venv $venv && $venv/bin/pip install --quiet --disable-pip-version-check -r tests/stores/requirements.txt && touch $venv/.installed ||
    { rm -rf $venv; say "skipped, moto cannot be installed"; exit 0; }
fi
programs=${1:-target/stores/debug}
[ -n "${1:-}" ] ||
  cargo build --target-dir target/stores -p peapod-coordinator -p peapod-worker --features peapod-coordinator/aws,peapod-worker/aws --bins
coordinator=$programs/coordinator

work=$(mktemp -d)
clean_up() {
  kill "${server:-}" 2>/dev/null || true
  rm -rf "$work"
}
trap clean_up EXIT

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
$venv/bin/moto_server --host 127.0.0.1 --port "$port" >"$work/server.log" 2>&1 &
server=$!
export AWS_ENDPOINT=http://127.0.0.1:$port AWS_ALLOW_HTTP=true AWS_REGION=us-east-1 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
export PEAPOD_DEVICE=cpu OMP_NUM_THREADS=1
for _ in {1..100}; do
  curl -sf -m 10 -X PUT "$AWS_ENDPOINT/peapod" >/dev/null && break
  kill -0 $server || fail "the server has ended"
  sleep 0.1
done
for shard in tests/demo/shards/*.tar; do
  curl -sf -m 10 -T "$shard" "$AWS_ENDPOINT/peapod/shards/${shard##*/}" || fail "$shard cannot be put there"
done

# Trains as far as step $1 with the folder $2, whatever comes behind.
train() {
  local steps=$1 state=$2
  shift 2
  "$coordinator" --local --world-size 2 --http-addr off --state-dir "$work/$state" --job tests/demo/job.toml --set "train.steps=$steps" \
    --set 'data.shards=["s3://peapod/shards/*.tar"]' --set checkpoint.store=s3://peapod/runs/demo --set checkpoint.every_steps=10 \
    --set checkpoint.keep=2 "$@" >"$work/$state-$steps.log" 2>&1
}
steps_stored() {
  "$coordinator" checkpoints list --json --checkpoints s3://peapod/runs/demo | python3 -c 'import json, sys; print(*(c["step"] for c in json.load(sys.stdin)))'
}

train 40 first || fail "the job"
[ "$(steps_stored)" = "30 40" ] || fail "checkpoints of steps $(steps_stored), not 30 and 40"
say "40 steps trained from s3:// into s3://, two checkpoints kept"

# Another machine: nothing is left but the store.
train 60 second || fail "the job that goes on"
grep -q "from step 40" "$work/second-60.log" || fail "it did not go on from step 40"
grep -q "s3://peapod/runs/demo was the coordinator's on " "$work/second-60.log" || fail "it did not see whose the store was"
[ "$(steps_stored)" = "50 60" ] || fail "checkpoints of steps $(steps_stored), not 50 and 60"
say "another machine went on from step 40"

"$coordinator" checkpoints export "$work/out" --checkpoints s3://peapod/runs/demo >/dev/null
[ -s "$work/out/proj_0_60/pytorch_model.bin" ] || fail "no adapter was exported"
say "the adapter was exported"

# A part is damaged while it lies there.
printf 'not weights' >"$work/damage"
curl -sf -m 10 "$AWS_ENDPOINT/peapod?list-type=2&prefix=runs/demo" | grep -oE 'runs/demo/step-000000060-g[0-9]+/adapter.safetensors' | while read -r key; do
  curl -sf -m 10 -T "$work/damage" "$AWS_ENDPOINT/peapod/$key"
done
code=0
train 80 third || code=$?
[ $code = 1 ] && grep -q "checkpoint step-000000060-g.* in s3://peapod/runs/demo is damaged: adapter.safetensors has 11 bytes" "$work/third-80.log" ||
  fail "a damaged checkpoint ends with $code"
say "a damaged checkpoint is named"

code=0
train 5 fourth --set checkpoint.store=s3://no-such-bucket/run || code=$?
[ $code = 1 ] && grep -q "^coordinator: checkpoint store s3://no-such-bucket/run: " "$work/fourth-5.log" || fail "a bucket that is not there ends with $code"
say "a bucket that is not there is named: $(grep -oE 'NoSuchBucket' "$work/fourth-5.log" | head -1)"
