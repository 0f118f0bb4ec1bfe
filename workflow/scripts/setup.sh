#!/usr/bin/env bash
# Make .venv from requirements.lock, install mango into it (editable) and see that LaTeX is there. Run through `make setup`.
# A second run finds the stamp and returns at once. LaTeX is installed beside the Python packages, for the two take as long.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TEX_PACKAGES="texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended texlive-science lmodern latexmk"
# One file from each package: a latexmk without them would only fail half an hour later.
TEX_FILES="booktabs.sty tcolorbox.sty siunitx.sty algpseudocodex.sty lmodern.sty phvr8t.tfm"
STAMP=.venv/.setup

die() {
    echo "make setup: $*" >&2
    exit 1
}

latex_ready() {
    command -v tectonic >/dev/null && return
    command -v latexmk >/dev/null && command -v kpsewhich >/dev/null || return 1
    # shellcheck disable=SC2086
    [ "$(kpsewhich $TEX_FILES | wc -l)" -eq "$(wc -w <<<"$TEX_FILES")" ]
}

# Apt is used only by root on a Debian-like system; elsewhere the packages are named and the user decides.
can_apt() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# The path is part of the key: scripts in .venv/bin carry it, so a moved checkout is set up again.
key=$({ cat requirements.lock pyproject.toml workflow/scripts/setup.sh && pwd; } | sha256sum | cut -d' ' -f1)
if [ "$(cat $STAMP 2>/dev/null)" = "$key" ] && [ -x .venv/bin/mango ] && latex_ready; then
    exit 0
fi

python=$(find_python) || die "Python 3.11 or newer is needed: install the package python3.11, or name an interpreter with PYTHON=..."
venv_package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$venv_package")
latex_ready || missing+=($TEX_PACKAGES)
if [ ${#missing[@]} -gt 0 ] && ! can_apt; then
    die "missing system packages; as root: apt-get install --no-install-recommends ${missing[*]} (elsewhere: any TeX Live with latexmk, or tectonic)"
fi

mkdir -p logs
if [ "${missing[0]:-}" = "$venv_package" ]; then
    echo "setup: installing $venv_package"
    apt_install "$venv_package" >logs/setup-venv.log 2>&1 </dev/null || die "apt-get failed: see logs/setup-venv.log"
fi

tex_job=
if ! latex_ready; then
    echo "setup: installing LaTeX in the background (logs/setup-latex.log)"
    # shellcheck disable=SC2086
    apt_install $TEX_PACKAGES >logs/setup-latex.log 2>&1 </dev/null &
    tex_job=$!
fi

rm -f $STAMP
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
fi
echo "setup: installing $(grep -c == requirements.lock) Python packages into .venv (about three minutes; logs/setup-pip.log)"
{
    .venv/bin/python -m pip install --progress-bar off -r requirements.lock &&
        .venv/bin/python -m pip install --no-deps --no-build-isolation --editable .
} >logs/setup-pip.log 2>&1 </dev/null && python_ready=yes || python_ready=no

if [ -n "$tex_job" ]; then # also when pip failed: apt-get is not to be cut off
    wait "$tex_job" || die "apt-get failed: see logs/setup-latex.log"
    latex_ready || die "LaTeX was installed but is still incomplete: see logs/setup-latex.log"
fi
if [ $python_ready = no ]; then
    grep -v '^WARNING' logs/setup-pip.log | tail -n 3 >&2
    die "pip failed: see logs/setup-pip.log"
fi
echo "$key" >$STAMP
echo "setup: done"
