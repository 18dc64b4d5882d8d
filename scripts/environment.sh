# Sourced by the other scripts: makes or reuses .venv, and installs the package into it with the pinned versions.
# usage: make_environment [extra]

make_environment() {
  local package="." stamp=".venv/.installed" python="${PYTHON:-python3}"
  if [ $# -gt 0 ]; then package=".[$1]"; stamp=".venv/.installed-$1"; fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "This needs Python 3.10 or newer; '$python' is not. Set PYTHON=/path/to/python3." >&2
    exit 2
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "Making the virtual environment .venv"
    "$python" -m venv .venv
  fi
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/constraints.txt -nt "$stamp" ]; then
    echo "Installing ldm_vae and what it needs (once; a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --constraint scripts/constraints.txt --editable "$package"
    touch "$stamp"
  fi
}
