#!/usr/bin/env bash
# The demo in containers: builds both images from deploy/images/, trains with a coordinator and three workers on a network of their own, and
# takes away what a cluster takes away: a worker, the coordinator, a cable, and a worker in order. The job must end as if nothing had been,
# with every sample of every epoch trained once.
# usage: tests/containers/run.sh [DIR]      DIR: built programs [target/debug]
# Needs a docker daemon, which nothing is asked of but the images, containers, network and volume named peapod-test-*, removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

programs=${1:-target/debug}
epochs=4 samples_per_epoch=1536 global_batch=32
name=peapod-test-$$
stage=target/containers
step=0

command -v docker >/dev/null || { echo "containers: skipped, docker is not installed"; exit 0; }
docker info >/dev/null 2>&1 || { echo "containers: skipped, no docker daemon answers"; exit 0; }
for needed in "$programs"/{coordinator,worker,sample} .libtorch/torch/lib; do
  [ -e "$needed" ] || { echo "containers: $needed is missing; run make build" >&2; exit 2; }
done
# Without the plug-in for it the newer clients have no BuildKit.
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0

say() { echo "containers: $*"; }

fail() {
  say "FAILED: $*" >&2
  for container in coordinator worker-{0,1,2}; do
    echo "--- $container" >&2
    docker logs --tail 25 "$name-$container" >&2 2>&1 || true
  done
  exit 1
}

clean_up() {
  docker rm --force --volumes "$name"-{coordinator,worker-{0,1,2}} >/dev/null 2>&1 || true
  docker network rm "$name" >/dev/null 2>&1 || true
  docker volume rm "$name-state" >/dev/null 2>&1 || true
  docker rmi --force "$name-coordinator" "$name-worker" "$name-base" >/dev/null 2>&1 || true
  docker image prune --force --filter "label=$name" >/dev/null 2>&1 || true
  rm -rf "$stage"
}
trap clean_up EXIT

# --- images ---

# A base of this machine's own C library and a few of its tools: what was built here runs on it, and no registry is needed.
make_base() {
  local root=$stage/base tool file
  mkdir -p "$root"/{usr/{bin,lib,lib64},etc/ssl/certs,tmp}
  ln -s usr/bin "$root/bin"
  ln -s usr/lib "$root/lib"
  ln -s usr/lib64 "$root/lib64"
  chmod 1777 "$root/tmp"
  for tool in sh install mkdir cp ln mv rm find chown dirname sleep; do
    install -m 755 "$(command -v "$tool")" "$root/usr/bin/$tool"
  done
  { ldd "$root"/usr/bin/* "$programs"/{coordinator,worker}; } | grep -oE '/[^ ]+' | grep -vE ':$|/torch/|/nvidia/' | sort -u | while read -r file; do
    mkdir -p "$root$(dirname "$file")"
    cp -L "$file" "$root$file"
  done
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" 2>/dev/null || true
  tar -C "$root" -c . | docker import - "$name-base" >/dev/null
}

rm -rf "$stage"
mkdir -p "$stage/context/dist" "$stage/context/tests"
make_base
cp -r deploy .dockerignore "$stage/context/"
cp -r tests/demo "$stage/context/tests/"
cp "$programs"/{coordinator,worker,sample} "$stage/context/dist/"
mkdir -p "$stage/context/dist/libtorch/torch"
cp -rL .libtorch/torch/lib "$stage/context/dist/libtorch/torch/"
cp -rL .libtorch/nvidia "$stage/context/dist/libtorch/"

build() { # coordinator|worker ARGUMENT...
  local image=$1
  shift
  docker build --label "$name" -f "$stage/context/deploy/images/$image.Dockerfile" -t "$name-$image" --build-arg BUILDER="$name-base" \
    --build-arg BASE="$name-base" --build-arg PROGRAMS=dist "$@" "$stage/context" > "$stage/build.log" 2>&1 ||
    { cat "$stage/build.log" >&2; exit 1; }
  [ "$(docker inspect --format '{{.Config.User}}' "$name-$image")" = 10001:10001 ] || fail "the $image runs as root"
  say "image of the $image: $(($(docker inspect --format '{{.Size}}' "$name-$image") / 1000000)) MB"
}
build coordinator
build worker --build-arg VARIANT=cpu --build-arg LIBTORCH=dist/libtorch
rm -rf "$stage/context" "$stage/base"

# --- a cluster ---

sed -E "s/^steps = .*/epochs = $epochs\ndecay_steps = $((epochs * samples_per_epoch / global_batch))/; s/^every_steps = .*/every_steps = 25/" \
  tests/demo/job.toml > "$stage/job.toml"
docker network create "$name" >/dev/null

docker run --detach --name "$name-coordinator" --hostname coordinator --network "$name" --read-only --cap-drop ALL --volume "$name-state:/state" \
  --volume "$PWD/$stage/job.toml:/etc/peapod/job.toml:ro" "$name-coordinator" --world-size 3 --min-world-size 2 --job /etc/peapod/job.toml \
  --listen 0.0.0.0:7733 --http-addr 0.0.0.0:7734 --sample-log /state/samples.tsv >/dev/null

state() { docker cp "$name-coordinator:/state/$1" - 2>/dev/null | tar -xO; }
said() { docker logs "$name-coordinator" 2>&1 | grep -cE "$1" || true; }

wait_until() { # SECONDS WHAT COMMAND...
  local seconds=$1 what=$2 began=$SECONDS
  shift 2
  until "$@" 2>/dev/null; do
    ((SECONDS - began < seconds)) || fail "after $seconds s still not: $what"
    sleep 0.3
  done
}
has_join_string() { state join >/dev/null; }
reached() { step=$(state steps.jsonl | sed -nE '$s/.*"step": ?([0-9]+).*/\1/p') && ((step >= $1)); }
get_on() { # to see that it trains, not only that it lives
  reached 0
  wait_until 120 "step $((step + 5))" reached $((step + 5))
}
has_said() { (($(said "$1") > $2)); }
# Runs a command and waits for one more line of the coordinator like this.
and_hears() { # PATTERN COMMAND...
  local pattern=$1 before
  before=$(said "$pattern")
  shift
  "$@" >/dev/null
  wait_until 90 "the coordinator says \"$pattern\"" has_said "$pattern" "$before"
}
code() { docker inspect --format '{{.State.ExitCode}}' "$name-$1"; }
is_over() { [ "$(docker inspect --format '{{.State.Running}}' "$name-$1")" = false ]; }

wait_until 20 "a join string" has_join_string
PEAPOD_JOIN=$(state join)
export PEAPOD_JOIN
for rank in 0 1 2; do
  docker run --detach --name "$name-worker-$rank" --network "$name" --env PEAPOD_JOIN --env PEAPOD_RANK=$rank --shm-size 256m \
    --read-only --cap-drop ALL "$name-worker" --threads 1 >/dev/null
done
wait_until 120 "step 5" reached 5
say "trains, step $step"

address=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$name-coordinator")
for page in healthz readyz metrics; do
  curl --silent --fail --max-time 5 --noproxy '*' "http://$address:7734/$page" >/dev/null || fail "/$page does not answer"
done
say "is healthy, ready, and gives metrics"

# --- what happens to clusters ---

and_hears ': 2 workers train from' docker kill "$name-worker-1"
get_on
and_hears ': 3 workers train from' docker start "$name-worker-1"
get_on
say "a worker was killed and started again, step $step"

docker kill "$name-coordinator" >/dev/null
sleep 2
for rank in 0 1 2; do
  is_over "worker-$rank" && fail "worker $rank ended with the coordinator"
done
and_hears 'going on with the run of' docker start "$name-coordinator"
get_on
say "the coordinator was killed and started again, step $step"

and_hears ': 2 workers train from' docker network disconnect "$name" "$name-worker-2"
get_on
and_hears ': 3 workers train from' docker network connect "$name" "$name-worker-2"
get_on
say "a worker was cut off and connected again, step $step"

# As the hook does before a pod ends.
hook=$(sed -nE 's/.*command: \[sh, -c, "(.*)"\]/\1/p' deploy/kubernetes/base/worker.yaml)
# The hook ends with its container.
drain() { docker exec "$name-worker-0" sh -c "${hook:?}" || true; }
and_hears ': 2 workers train from' drain
wait_until 60 "worker 0 leaves" is_over worker-0
[ "$(code worker-0)" = 143 ] || fail "the worker that was stopped in order exited with $(code worker-0), not 143"
and_hears ': 3 workers train from' docker start "$name-worker-0"
say "a worker was stopped in order (exit 143) and started again, step $step"

# --- the end ---

for container in coordinator worker-{0,1,2}; do
  wait_until 600 "$container ends" is_over "$container"
  [ "$(code "$container")" = 0 ] || fail "the $container exited with $(code "$container")"
done
for container in coordinator worker-{0,1,2}; do
  ! docker logs "$name-$container" 2>&1 | grep -q panicked || fail "the $container panicked"
done
state samples.tsv > "$stage/samples.tsv"
trained=$(wc -l < "$stage/samples.tsv")
distinct=$(cut -f 2- "$stage/samples.tsv" | sort -u | wc -l)
((trained == epochs * samples_per_epoch && distinct == trained)) ||
  fail "$trained samples trained, $distinct of them different, of $epochs x $samples_per_epoch"
say "all ended with 0; each of $epochs x $samples_per_epoch samples was trained once"
