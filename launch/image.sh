#!/usr/bin/env bash
# Builds the image of olmoe-train: launch/image.sh [cuda|cpu] [TAG]
#   ./launch/image.sh cuda registry.example.org/olmoe:0.1
# Without a docker daemon, the same steps make an environment in build/image-cuda or build/image-cpu instead, without the
# packages of the system: a test of the steps.
# TORCH_INDEX: an index of packages to take torch from; pip's own has the build for CUDA.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-cuda}
tag=${2:-olmoe-train:$target}
case $target in cuda|cpu) ;; *) echo "error: $target: the targets are cuda and cpu" >&2; exit 2 ;; esac

if docker info > /dev/null 2>&1; then
    exec docker build --target "$target" --tag "$tag" ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} "$repo"
fi
directory=$repo/build/image-$target
echo "== no docker daemon: the steps of the image in $directory"
mkdir -p "$repo/build"
bash "$repo/launch/image_steps.sh" install "$directory"
bash "$repo/launch/image_steps.sh" check "$directory" "$target"
