#!/usr/bin/env bash
# Puts the embedded model into the cluster that kubectl talks to, on CPUs, and asks it through a forwarded port.
#
#   IMAGE=registry.example.com/qvl:0.1.0 examples/kubernetes/deploy.sh      an image from `make image` with vLLM's CPU build
#   DRY_RUN=1 examples/kubernetes/deploy.sh                                  print what would be applied
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
manifests=$(kubectl kustomize --load-restrictor=LoadRestrictionsNone "$here")
[ -z "${IMAGE:-}" ] || manifests=$(sed -E "s|^( *)(- )?image: .*|\1\2image: $IMAGE|" <<<"$manifests")
if [ -n "${DRY_RUN:-}" ]; then
    echo "$manifests"
    exit 0
fi
key=$(openssl rand -hex 32)
kubectl create namespace qvl --dry-run=client -o yaml | kubectl apply -f -
kubectl -n qvl create secret generic qvl-keys --from-literal=api-keys="$key name=example" --dry-run=client -o yaml | kubectl apply -f -
kubectl apply -f - <<<"$manifests"
kubectl -n qvl rollout status deploy/qvl --timeout=10m
echo "kubectl -n qvl port-forward deploy/qvl 8000, then:"
echo "OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=$key python examples/ask.py docs/images/shapes.png 'How many shapes are in the picture?'"
