#!/usr/bin/env bash
# What has to be done on a worker; the other scripts call it there over ssh.
#   install                make the virtual environment and install the checkout with its TPU extra
#   start RUN COMMAND…     run the command in the checkout, detached
#   status RUN             print `gold_jax WORKER RUN STATE`: none, running, lost (gone without an exit code) or a code
#   stop RUN               ask the run to save and end
set -euo pipefail

checkout=$HOME/gold_jax
venv=$HOME/gold_jax_venv
folder=$HOME/gold_jax_runs/${2:-}

fail() {
  printf 'on_worker.sh on %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

make_venv() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv "$venv"
      return
    fi
  done
  # The TPU images stand on Ubuntu 22.04, whose Python is 3.10. uv brings a newer one without root, and without waiting
  # for apt, which updates itself on a new VM.
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --seed --python 3.12 "$venv"
}

install() {
  if [[ ! -x $venv/bin/pip ]]; then
    rm -rf "$venv"
    make_venv
  fi
  cd "$checkout"
  "$venv/bin/python" -m pip install --quiet '.[tpu]'
  printf 'gold_jax %s installed\n' "$(hostname)"
}

# The lock is held by everything that belongs to the run: it tells a living run from a dead one also after a reboot,
# where a process id would not.
is_free() { flock --nonblock "$folder/lock" true; }

start() {
  shift
  mkdir -p "$folder"
  exec 9>>"$folder/lock"
  flock --nonblock 9 || fail "run ${folder##*/} is still running here (stop.sh ends it)"
  rm -f "$folder/exit_code"
  printf '== %s %s\n' "$(date '+%F %T')" "$*" >>"$folder/log"
  cd "$checkout"
  # A session of its own, so that the end of the ssh connection does not reach it.
  PATH=$venv/bin:$PATH PYTHONUNBUFFERED=1 setsid bash tpu_scripts/on_worker.sh hold "${folder##*/}" "$@" \
    >>"$folder/log" 2>&1 </dev/null &
  printf 'gold_jax %s %s started\n' "$(hostname)" "${folder##*/}"
}

hold() {
  shift
  local code=0
  echo $$ >"$folder/pid"
  trap : TERM INT HUP # the signal is the command's to answer; this shell stays to write its exit code down
  "$@" || code=$?
  echo "$code" >"$folder/exit_code.new"
  mv "$folder/exit_code.new" "$folder/exit_code"
  printf '== %s exit code %s\n' "$(date '+%F %T')" "$code"
}

status() {
  local state
  if [[ -f $folder/exit_code ]]; then
    state=$(cat "$folder/exit_code")
  elif [[ ! -f $folder/lock ]]; then
    state=none
  elif is_free; then
    state=lost
  else
    state=running
  fi
  printf 'gold_jax %s %s %s\n' "$(hostname)" "${folder##*/}" "$state"
}

stop() {
  if [[ ! -f $folder/pid ]] || is_free; then fail "run ${folder##*/} is not running here"; fi
  kill -TERM -- "-$(cat "$folder/pid")"
}

case ${1:-} in
install | start | hold | status | stop)
  action=$1
  shift
  "$action" "$@"
  ;;
*) fail "what is '${1:-}'?" ;;
esac
