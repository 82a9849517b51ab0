#!/bin/sh
# Compiles requirements/{cpu,gpu}.txt from pyproject.toml with uv: after changing a dependency, run this and commit both.
# A directory of wheels that holds torch's CPU build can be named in WHEELS; else PyTorch's own index is asked.
set -eu
cd "$(dirname "$0")/.."
common="--quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate
        --no-emit-find-links --no-emit-index-url --constraint requirements/constraints.txt --extra dev --extra docs pyproject.toml"
torch="${WHEELS:+--find-links $WHEELS}"
[ -n "$torch" ] || torch="--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match"
# torch and torchvision are install.sh's to choose on a CPU; the rest of these are left out there
uv pip compile $common $torch --extra cpu --override requirements/cpu-overrides.txt \
    --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio \
    --no-emit-package torchcodec --no-emit-package triton -o requirements/cpu.txt
uv pip compile $common --extra gpu -o requirements/gpu.txt
