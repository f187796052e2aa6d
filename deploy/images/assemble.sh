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
certificates=/etc/ssl/certs/ca-certificates.crt

programs() { # DIR PACKAGE NAME...: from DIR, or built
  from=$1 package=$2
  shift 2
  if [ -z "$from" ]; then
    bins=$(printf -- '--bin %s ' "$@")
    # shellcheck disable=SC2086
    cargo build --release --locked -p "$package" $bins ${FEATURES:+--features "$FEATURES"}
    from=target/release
  fi
  "$here/../setup/install.sh" programs "$from" /out/programs/opt/peapod "$@"
  # What they talk HTTPS with: a slim base image has none, and no more has a slim builder.
  if ! [ -s "$certificates" ]; then
    { apt-get update -q && apt-get install -qy --no-install-recommends ca-certificates; } ||
      { echo "assemble.sh: no $certificates, and ca-certificates cannot be installed: give a BUILDER that has them" >&2; exit 1; }
  fi
  install -D -m 644 "$certificates" "/out/programs$certificates"
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
  "$here/../setup/install.sh" libtorch "$from" /out/libtorch/opt/peapod
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
