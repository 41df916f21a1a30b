#!/usr/bin/env bash
# From a fresh clone to a trained OLMoE: installs, prepares Python's standard library as a corpus, trains on 2 processes
# with validation before and after, exports to Hugging Face format, writes a report, generates from the result and sums
# it all up.
# Run again, it skips what is done. Arguments are Hydra overrides of the training:
#   ./launch/quickstart.sh trainer.max_steps=600 run_dir=runs/longer
# OLMOE_DATA_DIR and OLMOE_RUN_DIR say where things go (default: prepared/python_stdlib and runs/quickstart in the clone).
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data_dir=${OLMOE_DATA_DIR:-$repo/prepared/python_stdlib}
run_dir=${OLMOE_RUN_DIR:-$repo/runs/quickstart}
for override in "$@"; do
    case $override in
        data.dir=*) data_dir=${override#*=} ;;
        run_dir=*) run_dir=${override#*=} ;;
    esac
done
processes=2

source "$repo/launch/common.sh"
ensure_venv "$repo"

echo "== preparing the corpus in $data_dir"
olmoe prepare data=python_stdlib data.dir="$data_dir"

echo "== training on $processes processes in $run_dir"
share_cores "$processes"
python "$repo/launch/torchrun.py" --standalone --nproc-per-node "$processes" -m olmoe_train.train \
    experiment=quickstart parallel.expert_parallel_size=2 data.dir="$data_dir" run_dir="$run_dir" "$@" || {
    code=$?
    [ "$code" != 75 ] || echo "== stopped after saving: run the same command again to continue"
    exit "$code"
}

step=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["step"])' "$run_dir/status.json")
hf_dir=$(printf '%s/hf/step-%08d' "$run_dir" "$step")
if [ ! -d "$hf_dir" ]; then
    echo "== exporting to $hf_dir"
    olmoe export source="$run_dir" step="$step" out="$hf_dir"
fi

echo "== writing a report"
olmoe report source="$run_dir"

echo "== generating from it"
olmoe generate source="$hf_dir" prompt="def main(" max_new_tokens=96 temperature=0.7

echo "== summary"
python "$repo/launch/summary.py" "$run_dir" "$data_dir" "$hf_dir"
