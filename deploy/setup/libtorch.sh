#!/usr/bin/env bash
# Installs libtorch 2.11.0 from the PyPI wheel into DIR (torch/ beside nvidia/, so that libtorch's own RPATH resolves).
# usage: libtorch.sh DIR [full|slim]      default: full (5 GB) where an NVIDIA driver is present, slim (700 MB) elsewhere
set -euo pipefail
dir=$1
kind=${2:-$([ -e /proc/driver/nvidia/version ] && echo full || echo slim)}
torch=2.11.0
stamp="$dir/.installed-$torch-$kind"
[ -e "$stamp" ] && exit 0

command -v python3 >/dev/null || { echo "setup: python3 (3.10 or newer, with venv) is needed to unpack the libtorch wheel" >&2; exit 1; }
# uv resolves torch in seconds where pip takes minutes; it lives in a venv of its own because distributions forbid system-wide installs.
tools="$dir.tools"
if ! [ -x "$tools/bin/uv" ]; then
  rm -rf "$tools"
  python3 -m venv "$tools" || { echo "setup: 'python3 -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
  "$tools/bin/pip" install --quiet --disable-pip-version-check uv
fi

rm -rf "$dir"
mkdir -p "$dir"
echo "setup: installing libtorch $torch ($kind) into $dir"
if [ "$kind" = full ]; then
  "$tools/bin/uv" pip install --quiet --python "$tools/bin/python" --target "$dir" "torch==$torch"
else
  "$tools/bin/uv" pip install --quiet --python "$tools/bin/python" --target "$dir" --no-deps "torch==$torch" \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-cuda-crt==13.0.88
  # What only a GPU or Python needs. The linker script keeps `-ltorch` satisfied without libtorch_cuda.
  rm -f "$dir"/torch/lib/libtorch_cuda*.so "$dir"/torch/lib/libc10_cuda.so "$dir"/torch/lib/libtorch_nvshmem.so "$dir"/torch/lib/libtorch_python.so
  rm -f "$dir"/torch/lib/libtorch.so
  echo 'INPUT(libtorch_cpu.so)' > "$dir/torch/lib/libtorch.so"
fi
touch "$stamp"
