#!/usr/bin/env bash
# The steps that make an image, one a call: the Dockerfile runs them, and so does launch/image.sh without docker.
#   image_steps.sh system               packages of Debian that training needs, as root
#   image_steps.sh install DIRECTORY    olmoe-train from this checkout into a new environment, pinned by constraints.txt
#   image_steps.sh check DIRECTORY TARGET    that environment plans and composes; TARGET: cuda or cpu
# TORCH_INDEX: an index of packages to take torch from, for example one with builds for CPUs (default: pip's own).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in
    system)
        # gcc: torch.compile and DeepSpeed build code when they are first used. libibverbs1: NCCL over InfiniBand.
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends bash gcc g++ git libibverbs1
        rm -rf /var/lib/apt/lists/*
        ;;
    install)
        python3 -m venv --clear "$2"
        pip=("$2/bin/python" -m pip --disable-pip-version-check --quiet)
        if [ -n "${TORCH_INDEX:-}" ]; then
            "${pip[@]}" install --constraint "$repo/constraints.txt" --index-url "$TORCH_INDEX" torch
        fi
        "${pip[@]}" install --constraint "$repo/constraints.txt" "$repo"
        ;;
    check)
        cd /
        "$2/bin/olmoe" plan experiment=olmoe_1b_7b_0924 gpus=8 > /dev/null
        "$2/bin/olmoe" train experiment=quickstart data.dir=none --cfg job > /dev/null
        "$2/bin/olmoe" launch slurm experiment=quickstart data.dir=none gpus_per_node=1 > /dev/null
        built=$("$2/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
        if [ "$3" = cuda ] && [ "$built" != cuda ]; then
            echo "error: this torch is built for CPUs; TORCH_INDEX must name an index with builds for CUDA" >&2
            exit 2
        fi
        echo "olmoe-train is installed in $2, with a torch for $built"
        ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
