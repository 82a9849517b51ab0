#!/bin/sh
# Fills a virtual environment: requirements/install.sh VENV cpu|gpu. Called by the Makefile; safe to call again.
#
# On a CPU three things need care:
# - torch must be the CPU build. The configured index is tried first (a mirror may have it), then PyTorch's own.
# - torchvision likewise; where neither has a CPU build, PyPI's CUDA build is taken, which toolkit/compat.py mends.
# - everything else is installed without following dependencies, since some packages ask for triton, torchaudio or
#   torchcodec, which a CPU does not need and which break it. The list was resolved with them: see cpu-overrides.txt.
#
# uv does the work where it can be had from the configured index and takes pip's settings (uv_settings.py); else pip.
# Neither compiles to bytecode: of 28,000 files Python compiles those that are imported, when they are. Where it must not
# (PYTHONDONTWRITEBYTECODE), which would have every process compile them anew, all are compiled at the end. Who installs
# as one user and runs as another does it once: python -m compileall -q -j 0 VENV/lib
set -eu
venv=${1:?usage: install.sh VENV cpu|gpu} backend=${2:?usage: install.sh VENV cpu|gpu}
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
seldom='/tests?/|/transformers/models/[b-pr-z][a-z0-9_]*/|/vllm/models/[a-ce-z][a-z0-9_]*/|/torch/testing/_internal/|/sympy/(physics|stats)/'
seldom="$seldom|/(anthropic|datasets|fontTools|langsmith|mypyc?|numba|pandas|pip|sentry_sdk)/|/pygments/lexers/|/playwright/async_api/"
torch=2.13.0 torchvision=0.28.0 uv=0.13.9 index=https://download.pytorch.org/whl/cpu
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old: install Python 3.11 or newer, or set PYTHON=python3.12" >&2; exit 2; }
for marker in "$venv"/.installed-*; do  # vLLM's CPU and GPU builds do not live side by side
    [ ! -e "$marker" ] || [ "$marker" = "$venv/.installed-$backend" ] || {
        echo "$venv was made for another backend: making it anew"; rm -rf "$venv"; }
done
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "error: no virtual environment could be made: install your system's python3-venv package" >&2; exit 2; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
with_pip() { pip install -q --no-compile "$@"; }
with_uv() { "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; }
install() { { [ -n "$uv" ] && with_uv "$@"; } || with_pip "$@"; }
quietly() { install --no-deps "$@" >/dev/null 2>&1; }

if with_pip "uv==$uv" >/dev/null 2>&1 && settings=$("$venv/bin/python" "$here/uv_settings.py"); then
    eval "$settings"
else
    uv=
fi

echo "installing into $venv for the $backend: a few minutes"
case $backend in
cpu)
    echo "[1/3] torch $torch, CPU build"
    quietly "torch==$torch+cpu" || install --no-deps "torch==$torch+cpu" --index-url "$index"
    quietly "torchvision==$torchvision+cpu" || quietly "torchvision==$torchvision+cpu" --index-url "$index" ||
        install --no-deps "torchvision==$torchvision"
    echo "[2/3] vLLM, transformers, AutoAWQ and the rest"
    install --no-deps setuptools==78.1.1 wheel
    install --no-deps --no-build-isolation -r "$here/cpu.txt"
    ;;
gpu)
    echo "[1/3] torch $torch, CUDA build"
    install "torch==$torch" setuptools wheel
    echo "[2/3] vLLM, transformers, AutoAWQ and the rest"
    install --no-build-isolation -r "$here/gpu.txt"
    ;;
*) echo "error: unknown backend '$backend': use cpu or gpu" >&2; exit 2 ;;
esac
echo "[3/3] qvl"
install --no-deps --no-build-isolation -e "$here/.."
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    # But for what is seldom imported: tests, and models and clients of other kinds. A few templates are no Python.
    "$venv/bin/python" -m compileall -q -j 0 -x "$seldom" "$venv/lib" >/dev/null 2>&1 || :
fi
