#!/bin/sh
# Runs inside the builds of the images: gathers under /out what an image holds.
# usage: assemble.sh libtorch cuda|cpu [DIR]   libtorch's shared libraries: from DIR (torch/ beside nvidia/), or from the pinned PyPI wheels
#        assemble.sh coordinator [DIR]         the program: DIR/coordinator, or built here
#        assemble.sh worker cuda|cpu [DIR]     the programs: DIR/worker and DIR/sample, or built here with /libtorch
# What is built here has the features that $FEATURES names: aws,gcp,azure,otlp.
set -eu

# Where both kinds of images run as: nobody in particular, and the owner of what the coordinator writes.
owner=10001:10001
here=$(dirname "$0")

programs() { # DIR PACKAGE NAME...: from DIR, or built
  from=$1 package=$2
  shift 2
  mkdir -p /out/programs/opt/peapod/bin
  if [ -z "$from" ]; then
    bins=$(printf -- '--bin %s ' "$@")
    # shellcheck disable=SC2086
    cargo build --release --locked -p "$package" $bins ${FEATURES:+--features "$FEATURES"}
    from=target/release
  fi
  for name; do
    install -m 755 "$from/$name" /out/programs/opt/peapod/bin/
  done
  # What they talk HTTPS with, where the base image has none.
  if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    install -D -m 644 /etc/ssl/certs/ca-certificates.crt /out/programs/etc/ssl/certs/ca-certificates.crt
  fi
}

case $1 in
libtorch)
  kind=$2 from=${3:-}
  if [ -z "$from" ]; then
    from=/libtorch
    python3 -c 'import ensurepip' 2>/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends python3-venv; }
    [ "$kind" = cpu ] && size=slim || size=full
    "$here/../setup/libtorch.sh" "$from" "$size"
  fi
  # Nothing but libraries: torch/ stays beside nvidia/, where libtorch's own RPATH looks for the latter.
  mkdir -p /out/libtorch/torch
  cp -a "$from/torch/lib" /out/libtorch/torch/
  cp -a "$from/nvidia" /out/libtorch/
  find /out/libtorch -name '*.a' -delete
  ;;
coordinator)
  programs "${2:-}" peapod-coordinator coordinator
  mkdir -p /out/state
  chown "$owner" /out/state
  ;;
worker)
  kind=$2
  export LIBTORCH=/libtorch/torch
  programs "${3:-}" peapod-worker worker sample
  # The programs look for libtorch in ../lib.
  ln -s libtorch/torch/lib /out/programs/opt/peapod/lib
  # Models of the hub: for a volume, which takes its mode from here.
  install -d -m 1777 /out/programs/models
  if [ "$kind" = cpu ]; then
    # `make demo` in containers: its job file names these paths.
    mkdir -p /out/programs/opt/peapod/tests/demo
    cp -a tests/demo/model tests/demo/shards tests/demo/prompts.tsv /out/programs/opt/peapod/tests/demo/
  fi
  ;;
*)
  echo "assemble.sh: what is $1?" >&2
  exit 2
  ;;
esac
