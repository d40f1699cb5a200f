#!/usr/bin/env bash
# Sets up .venv at need and runs lclseg in it.
#
#   ./run.sh                                       trains on the synthetic phantom set
#   ./run.sh --config.seed=3                       the same, with overrides
#   ./run.sh configs/acdc.py --workdir=DIR ...     another config
#   ./run.sh test [pytest arguments]               ruff, mypy and the tests
#
# LCLSEG_JAX  cpu (default), cuda12, cuda13 or tpu: the build of JAX
# PYTHON      the Python, 3.11 or newer, that .venv is made with
#
# Relative paths are those of this folder, wherever the script is called from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Memory in pages of 2 MB, where Linux leaves that to the program: XLA takes hundreds of MB anew for
# each step on CPUs, and in pages of 4 kB the step is a tenth longer (benchmarks/README.md). Only
# glibc reads it, 2.35 or newer.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Line 1: Python and JAX build of .venv, or "unfinished". Then a line for each set-up it has.
stamp=.venv/.lclseg-stamp
log=.venv/.lclseg-set-up.log

fail() {
  echo "run.sh: $*" >&2
  exit 1
}

find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    # Asked, not only looked for: the name may be a version manager's, with no Python behind it.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer (tried ${candidates[*]}); set PYTHON=/path/to/python3.11"
}

make_venv() { # PYTHON
  rm -rf .venv
  mkdir .venv
  echo unfinished >"$stamp"
  if ! "$1" -m venv .venv >"$log" 2>&1; then
    cat "$log" >&2
    fail "$1 cannot make a virtual environment with pip in it; on Debian and Ubuntu:" \
      "apt-get install $("$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-venv"
  fi
}

set_up() { # run|test: makes .venv ready for it, unless it is
  local jax=${LCLSEG_JAX:-cpu} extras=() python environment digest target
  case $jax in
    cpu) ;;
    cuda12 | cuda13 | tpu) extras+=("$jax") ;;
    *) fail "LCLSEG_JAX is '$jax'; wanted cpu, cuda12, cuda13 or tpu" ;;
  esac
  if [[ $1 == test ]]; then extras+=(test); fi
  python=$(find_python)
  environment="$("$python" -c 'import platform; print(platform.python_version())') $jax"
  digest=$({ echo "$environment $PWD" && cat setup.cfg pyproject.toml; } | cksum)
  if [[ ! -x .venv/bin/python ]]; then
    make_venv "$python"
  elif [[ -e $stamp ]]; then # Without one, .venv was made by hand: it is added to.
    if grep -qxF "$1 $digest" "$stamp"; then return; fi
    # Packages of another Python or JAX build would linger, a set-up cut short may be broken.
    if [[ $(head -n 1 "$stamp") != "$environment" ]]; then make_venv "$python"; fi
  fi
  echo "run.sh: setting up .venv for JAX on $jax; this takes minutes the first time" >&2
  echo unfinished >"$stamp"
  target=.
  if ((${#extras[@]})); then target=".[$(IFS=, && echo "${extras[*]}")]"; fi
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$target" \
    >"$log" 2>&1; then
    cat "$log" >&2
    fail "pip could not install lclseg into .venv; its messages are above"
  fi
  # Apart from the rest, since it needs a C++ compiler.
  if [[ $1 == test ]] && ! .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -e ".[oracle]" >>"$log" 2>&1; then
    echo "run.sh: pydensecrf2 could not be built ($log): the tests against it are skipped" >&2
  fi
  # The tests' packages include the run's.
  printf '%s\n' "$environment" "run $digest" >"$stamp"
  if [[ $1 == test ]]; then echo "test $digest" >>"$stamp"; fi
}

if [[ ${1:-} == test ]]; then
  shift
  set_up test
  status=0
  .venv/bin/ruff check . || status=1
  .venv/bin/ruff format --check . || status=1
  .venv/bin/mypy lclseg tfds_builders || status=1
  # A file's tests share prepared data and compiled programs, so a file stays in one process.
  .venv/bin/python -m pytest -n 2 --dist loadfile "$@" || status=$?
  exit "$status"
fi

config=configs/phantom.py
if [[ -n ${1:-} && $1 != -* ]]; then
  config=$1
  shift
  # What follows a colon is the config's own argument.
  [[ -f ${config%%:*} ]] || fail "no config file ${config%%:*}; there are $(echo configs/*.py)"
fi
set_up run
exec .venv/bin/python -m lclseg.main --config="$config" "$@"
