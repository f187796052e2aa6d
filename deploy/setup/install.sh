#!/bin/sh
# Puts what runs into a folder that stands alone: bin/ with programs, libtorch/ with its libraries, and lib, where programs look for those.
# usage: install.sh programs FROM TO NAME...    FROM/NAME to TO/bin
#        install.sh libtorch FROM TO            FROM/torch/lib and FROM/nvidia to TO/libtorch
# Programs that run meanwhile keep what they have: nothing is written over, only replaced.
set -eu
what=$1 from=$2 to=$3
shift 3

case $what in
programs)
  mkdir -p "$to/bin"
  for name; do
    [ -x "$from/$name" ] || { echo "install: $from/$name is missing: cargo build --release --workspace" >&2; exit 1; }
    install -m 755 "$from/$name" "$to/bin/"
  done
  ;;
libtorch)
  [ -e "$from/torch/lib" ] || { echo "install: $from/torch/lib is missing: make setup" >&2; exit 1; }
  rm -rf "$to/libtorch.new"
  mkdir -p "$to/libtorch.new/torch"
  # Nothing but libraries: torch/ stays beside nvidia/, where libtorch's own RPATH looks for the latter.
  cp -a --no-preserve=ownership "$from/torch/lib" "$to/libtorch.new/torch/"
  cp -a --no-preserve=ownership "$from/nvidia" "$to/libtorch.new/"
  find "$to/libtorch.new" -name '*.a' -delete
  rm -rf "$to/libtorch"
  mv "$to/libtorch.new" "$to/libtorch"
  # The programs look for libtorch in ../lib.
  ln -sfn libtorch/torch/lib "$to/lib"
  ;;
*)
  echo "install.sh: what is $what?" >&2
  exit 2
  ;;
esac
