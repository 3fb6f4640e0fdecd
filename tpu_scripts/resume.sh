#!/usr/bin/env bash
# Keeps a run going until it has ended well, over any number of preemptions.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='resume.sh --name NAME --zone ZONE --accelerator TYPE [--run RUN] [flags] -- COMMAND…
Watches a run and does what is due: waits for the TPU, or makes it anew where it was taken away, installs the project
where it is not there, and runs COMMAND again with --resume_from_checkpoint latest behind it, until its exit code is
0. It can be ended and started at any time, and also starts a run that never ran. Exit code 75 (preempted, and saved),
a run that is gone without an exit code, and workers that JAX aborted because they lost another one (134) are continued;
an error of any worker ends it, with its exit code. After that, mend what was wrong, install.sh, launch.sh, and
resume.sh again. Checkpoints must lie on gs://, as the disks of the workers
go with them.'
FLAGS="$TPU_FLAGS $CREATE_FLAGS $INSTALL_FLAGS $SSH_FLAGS --run --poll --max-restarts"
parse "$@"
need_command
need_tpu

case " ${COMMAND[*]} " in
*' --resume_from_checkpoint'[' =']*) ;;
*) COMMAND+=(--resume_from_checkpoint latest) ;;
esac

# What the exit codes of all workers come to, one a line: 0 only where every worker has it. An error (below 128) counts for all:
# JAX aborts the other workers (134, SIGABRT) also where one fails. Without an error, workers were aborted because one of
# them was lost; a lone one lost nobody.
exit_codes() {
  awk '
    { code = $1 + 0; if (code > most) most = code; if (code < 128 && code > error) error = code; aborted += code == 134 }
    END { print (error ? error : (aborted && NR > 1) ? "preempted" : most + 0) }'
}

# One word for what all workers say.
summary() {
  local states
  states=$(awk '$1 == "gold_jax" && $3 == run { print $4 }' run="$RUN")
  case " $(tr '\n' ' ' <<<"$states")" in
  ' ' | '  ') echo unknown ;;
  *' running '*) echo running ;;
  *' none '*) echo none ;;
  *' 75 '* | *' lost '*) echo preempted ;;
  *) exit_codes <<<"$states" ;;
  esac
}

if [[ $DRY_RUN ]]; then
  await_tpu --recreate
  note 'how the run is, again and again'
  run_status
  note 'where it is not there'
  install_project
  note 'where it is not there, was preempted or is lost'
  launch_run "${COMMAND[@]}"
  exit
fi

errors=$(mktemp) # gcloud names every worker it speaks to, each time: shown only where that failed
trap 'rm -f "$errors"' EXIT
restarts=0 trouble=0 last=''
while :; do
  await_tpu --recreate
  now=unknown
  if answer=$(run_status 2>"$errors"); then now=$(summary <<<"$answer"); fi
  if [[ $now != "$last" ]]; then say "$(date '+%F %T') run $RUN: $now"; fi

  case $now in
  running) trouble=0 ;;
  0) exit 0 ;;
  unknown)
    trouble=$((trouble + 1))
    cat "$errors" >&2
    say "the workers could not be asked (attempt $trouble of 10)"
    ;;
  none)
    if install_project && launch_run "${COMMAND[@]}"; then trouble=0; else trouble=$((trouble + 1)); fi
    ;;
  *)
    # An ending is believed when it is seen twice: a TPU that is being taken away looks well for a while.
    if [[ $now == "$last" ]]; then
      if [[ $now != preempted ]]; then
        say "run $RUN ended with exit code $now; its last lines on worker 0:"
        on_workers 0 "tail -n 30 gold_jax_runs/$RUN/log" >&2 || true
        exit "$now"
      fi
      restarts=$((restarts + 1))
      if ((restarts > MAX_RESTARTS)); then die "run $RUN was restarted $MAX_RESTARTS times and is not done"; fi
      say "$(date '+%F %T') restart $restarts"
      if launch_run "${COMMAND[@]}"; then now=started; else trouble=$((trouble + 1)); fi
    fi
    ;;
  esac
  if ((trouble >= 10)); then die "the workers of $NAME did not do as asked ten times running; see above"; fi
  last=$now
  sleep "$POLL"
done
