# Sourced by scripts/demo and scripts/test: makes or reuses .venv in this checkout and installs into it.
# Usage: install_into_venv EXTRAS CPU   (EXTRAS such as "[test]" or "", CPU 1 or 0)

install_into_venv() {
    local extras="$1" cpu="$2" python
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed, got $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
        exit 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
    # Torch first: with it installed, nothing that follows fetches another build of it.
    if [ "$cpu" = 1 ]; then
        pip install --quiet --disable-pip-version-check -c constraints.txt \
            --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu"
    else
        pip install --quiet --disable-pip-version-check -c constraints.txt torch
    fi
    pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
}

parse_cpu() {
    cpu=0
    for argument in "$@"; do
        case "$argument" in
            --cpu) cpu=1 ;;
            *) echo "unknown option '$argument': expected --cpu or nothing" >&2; exit 2 ;;
        esac
    done
}
