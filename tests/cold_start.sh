#!/usr/bin/env bash
# Times what a stranger does first, by part: README's two commands and `make test`, in a fresh clone of HEAD without any cache.
#
# usage: tests/cold_start.sh [PART...]      parts in order: clone setup crates build demo schemas compile test; all of them if none is named
#        PEAPOD_COLD_DIR=DIR                where to (a folder that does not exist; default: one that is removed at the end)
#
# Needs 15 GB and the network. Fails where `make demo` takes more than 12 minutes or `make test` more than 20, which is meant for two cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
order=(clone setup crates build demo schemas compile test)
parts=("${@:-${order[@]}}")
demo_limit=$((12 * 60)) test_limit=$((20 * 60))

for part in "${parts[@]}"; do
  [[ " ${order[*]} " == *" $part "* ]] || { echo "cold start: there is no part \"$part\"; parts are: ${order[*]}" >&2; exit 2; }
done

if [ -n "${PEAPOD_COLD_DIR:-}" ]; then
  work=$PEAPOD_COLD_DIR
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

# Whatever this user has downloaded or built stays out of it; a mirror that cargo is told to use does not.
cargo_home=${CARGO_HOME:-$HOME/.cargo}
mkdir -p "$work/cargo"
for file in config.toml config; do
  [ ! -f "$cargo_home/$file" ] || cp "$cargo_home/$file" "$work/cargo/"
done
export PATH="$cargo_home/bin:$PATH" CARGO_HOME=$work/cargo XDG_CACHE_HOME=$work/cache UV_CACHE_DIR=$work/cache/uv PIP_CACHE_DIR=$work/cache/pip
unset PIP_FIND_LINKS UV_FIND_LINKS CARGO_TARGET_DIR LIBTORCH LD_LIBRARY_PATH RUSTC_WRAPPER CARGO_BUILD_RUSTC_WRAPPER
clone=$work/peapod

declare -A took
run() { # NAME COMMAND...: times a part, with its output in a log
  local name=$1 start=$EPOCHREALTIME
  shift
  echo "cold start: $name"
  if ! "$@" >"$work/$name.log" 2>&1; then
    tail -n 30 "$work/$name.log" >&2
    echo "cold start: $name failed" >&2
    exit 1
  fi
  took[$name]=$(awk -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f", to - from }')
}

for part in "${parts[@]}"; do
  case $part in
    clone) run clone git clone --quiet --no-local "$root" "$clone" ;;
    setup) run setup make -C "$clone" setup ;;
    crates) run crates env -C "$clone" cargo fetch --locked ;;
    build) run build make -C "$clone" build ;;
    demo) run demo make -C "$clone" demo ;;
    schemas) run schemas make -C "$clone" .bench/manifests/.installed ;;
    compile) run compile env -C "$clone" OMP_NUM_THREADS=1 cargo test --workspace --no-run ;;
    test) run test make -C "$clone" test ;;
  esac
done

sum() { # NAME...: seconds of these parts together, of those that ran
  for name in "$@"; do echo "${took[$name]:-0}"; done | awk '{ sum += $1 } END { printf "%.1f", sum }'
}
declare -A what=(
  [clone]="git clone" [setup]="libtorch (make setup)" [crates]="crates (cargo fetch)" [build]="programs (make build)"
  [demo]="training and drawing (make demo)" [schemas]="Kubernetes' schemas" [compile]="tests (cargo test --no-run)" [test]="running them (make test)"
)
printf '\n| part | seconds |\n|---|---|\n'
for part in "${order[@]}"; do
  [ -z "${took[$part]:-}" ] || printf '| %s | %s |\n' "${what[$part]}" "${took[$part]}"
done
demo=$(sum clone setup crates build demo)
tests=$(sum clone setup crates build schemas compile test)
[ -z "${took[demo]:-}" ] || printf '| **`git clone` and `make demo`**, cold | %s |\n' "$demo"
[ -z "${took[test]:-}" ] || printf '| **`git clone` and `make test`**, cold | %s |\n' "$tests"
printf '\n%s cores, %s\n' "$(nproc)" "$(rustc --version)"
awk -v demo="$demo" -v most="$demo_limit" 'BEGIN { exit demo > most }' || { echo "cold start: make demo took more than $demo_limit s" >&2; exit 1; }
awk -v tests="$tests" -v most="$test_limit" 'BEGIN { exit tests > most }' || { echo "cold start: make test took more than $test_limit s" >&2; exit 1; }
