# Sourced by the scripts beside it. `use_venv GROUP...` goes to the repository's root and puts first
# on PATH a virtual environment, .venv, that holds the package (editable) and these dependency
# groups. Installs only what is not there yet; concurrent callers wait for each other.
# PYTHON names the interpreter for a new one; else the first usable one from 3.10 to 3.14.
# A script that needs other versions sets venv, and newest if need be, before it calls.

venv=.venv
newest=14 # of Python 3

is_supported() {
  "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null
}

create_venv() {
  local python
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3.10 python3}; do
    if is_supported "$python" && "$python" -m venv --clear "$venv" >/dev/null 2>&1; then
      return
    fi
  done
  echo "no usable Python 3.10 to 3.$newest (with venv and pip) found; name one with PYTHON=" >&2
  return 1
}

install_groups() {
  local group stamp missing=()
  is_supported "$venv/bin/python" || create_venv
  stamp="$(cksum <pyproject.toml) $("$venv/bin/python" -VV) $PWD"
  for group in package "$@"; do
    [[ -f $venv/stamp-$group && $(<"$venv/stamp-$group") == "$stamp" ]] || missing+=("$group")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0

  # --group needs pip 25.1.
  "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
  echo "installing into $venv: ${missing[*]} (a minute, once)"
  "$venv/bin/python" -m pip install --quiet --editable . "${@/#/--group=}"
  # Bytecode for everything halves the start of MLflow; files for other Pythons may fail to compile.
  "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null || true
  for group in "${missing[@]}"; do
    echo "$stamp" >"$venv/stamp-$group"
  done
}

use_venv() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  # Output goes to stderr: stdout belongs to the script's own tool.
  {
    if command -v flock >/dev/null; then flock 9; fi # not on macOS: there, do not start two at once
    install_groups "$@" >&2
  } 9>"$venv.lock"
  export PATH="$PWD/$venv/bin:$PATH"
}
