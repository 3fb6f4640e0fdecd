# shellcheck shell=bash
# The TPU and its workers, through gcloud. Sourced by common.sh.

# ---- the TPU ----

where() { # the arguments that say where the TPU is
  SCOPE=(--zone="$ZONE")
  if [[ $PROJECT ]]; then SCOPE+=(--project="$PROJECT"); fi
}

create_tpu() {
  local tier=()
  if [[ $CAPACITY != on-demand ]]; then tier=(--"$CAPACITY"); fi
  where
  if [[ $KIND == queued ]]; then
    set -- gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${SCOPE[@]}" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME"
  else
    set -- gcloud compute tpus tpu-vm create "$NAME" "${SCOPE[@]}" \
      --accelerator-type="$ACCELERATOR" --version="$RUNTIME"
  fi
  call "$@" ${tier[@]+"${tier[@]}"} ${CREATE_ARGS[@]+"${CREATE_ARGS[@]}"}
}

delete_tpu() { # delete_tpu [--quiet]
  where
  if [[ $KIND == queued ]]; then
    # --force takes the TPU VM away with the queued resource; without it a running one is an error.
    call gcloud compute tpus queued-resources delete "$NAME" "${SCOPE[@]}" --force "$@"
  else
    call gcloud compute tpus tpu-vm delete "$NAME" "${SCOPE[@]}" "$@"
  fi
}

# Prints what gcloud says of a resource's state, MISSING where there is none, UNKNOWN where gcloud could not tell.
described() { # described (queued-resources|tpu-vm) FIELD
  local state error
  where
  set -- gcloud compute tpus "$1" describe "$NAME" "${SCOPE[@]}" --format="value($2)"
  if [[ $DRY_RUN ]]; then
    call "$@"
    return
  fi
  error=$(mktemp)
  if state=$("$@" 2>"$error" 3>&-) && [[ $state ]]; then
    echo "$state"
  elif grep -q -e NOT_FOUND -e 'not found' "$error"; then
    echo MISSING
  else
    cat "$error" >&2
    echo UNKNOWN
  fi
  rm -f "$error"
}

# One state for the queued resource and its VM: an ACTIVE queued resource may have a VM that is being taken away, or is
# gone already (GONE).
tpu_state() {
  local state=ACTIVE
  if [[ $KIND == queued ]]; then state=$(described queued-resources state.state); fi
  if [[ $state == ACTIVE || $DRY_RUN ]]; then
    state=$(described tpu-vm state)
    if [[ $KIND == queued && $state == MISSING ]]; then state=GONE; fi
  fi
  echo "$state"
}

# Waits until the TPU is ready; with --recreate, makes it anew where it is gone or was taken away.
await_tpu() {
  local state last='' trouble=0 attempts=0 made=''
  while :; do
    state=$(tpu_state)
    if [[ $DRY_RUN ]]; then
      if [[ ${1:-} == --recreate ]]; then
        note 'where it was taken away (SUSPENDED, FAILED, PREEMPTED, TERMINATED) or is not there'
        delete_tpu --quiet
        create_tpu
      fi
      return 0
    fi
    if [[ $state != "$last" ]]; then say "$(date '+%F %T') $NAME is $state"; fi
    last=$state
    case $state in
    READY) return 0 ;;
    STOPPED) die "$NAME is stopped: gcloud compute tpus tpu-vm start $NAME, or delete it" ;;
    UNKNOWN)
      trouble=$((trouble + 1))
      if ((trouble >= 10)); then die "gcloud could not say ten times running how $NAME is"; fi
      ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED | GONE | MISSING)
      if [[ ${1:-} != --recreate ]]; then die "$NAME is $state"; fi
      if [[ $made && $state == FAILED ]]; then
        die "$NAME was made anew and FAILED: gcloud compute tpus queued-resources describe $NAME says why"
      fi
      attempts=$((attempts + 1))
      if ((attempts > 100)); then die "$NAME could not be had in a hundred attempts"; fi
      if [[ $state != MISSING ]]; then delete_tpu --quiet || say "could not delete $NAME yet"; fi
      if create_tpu; then made=1; else say "could not create $NAME yet"; fi
      ;;
    *) trouble=0 ;;
    esac
    sleep "$POLL"
  done
}

# ---- its workers ----

# remote (ssh|scp) ARGUMENT…: through gcloud's alpha commands where only they have what was asked for.
remote() {
  local verb=$1 track=() batch=() arg
  shift
  where
  if [[ $BATCH_SIZE ]]; then track=(alpha) batch=(--batch-size="$BATCH_SIZE"); fi
  for arg in ${SSH_ARGS[@]+"${SSH_ARGS[@]}"}; do
    if [[ $arg == --tunnel-through-iap* ]]; then track=(alpha); fi
  done
  call gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm "$verb" "$@" "${SCOPE[@]}" \
    ${batch[@]+"${batch[@]}"} ${SSH_ARGS[@]+"${SSH_ARGS[@]}"}
}

on_workers() { remote ssh "$NAME" --worker="$1" --command="$2"; }

# on_worker.sh, on the workers, does what has to be done there; this is its command line.
worker_script() { command_line bash gold_jax/tpu_scripts/on_worker.sh "$@"; }

install_project() {
  local archive="$CHECKOUT/build/gold_jax.tgz" fetch
  if [[ $REPO ]]; then
    fetch="if [ -d gold_jax/.git ]; then git -C gold_jax fetch --depth 1 $(quoted "$REPO") $(quoted "${REF:-HEAD}")"
    fetch+=" && git -C gold_jax checkout --force --detach FETCH_HEAD"
    fetch+="; else git clone --depth 1 ${REF:+--branch $(quoted "$REF") }$(quoted "$REPO") gold_jax; fi"
  else
    fetch='mkdir -p gold_jax && tar -xzf gold_jax.tgz -C gold_jax'
    call mkdir -p "$CHECKOUT/build" &&
      call tar -czf "$archive" --exclude=__pycache__ -C "$CHECKOUT" gold_jax configs tpu_scripts pyproject.toml README.md LICENSE &&
      remote scp "$archive" "$NAME:gold_jax.tgz" --worker=all || return
  fi
  on_workers all "$fetch && $(worker_script install)"
}

launch_run() { on_workers all "$(worker_script start "$RUN" "$@")"; }

# One line for each worker: `gold_jax WORKER RUN STATE`, the state being none, running, lost or an exit code.
run_status() {
  on_workers all "if [ -f gold_jax/tpu_scripts/on_worker.sh ]; then $(worker_script status "$RUN"); else echo gold_jax \$(hostname) $RUN none; fi"
}
