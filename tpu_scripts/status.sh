#!/usr/bin/env bash
# Says how the TPU and the run are.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='status.sh --name NAME --zone ZONE [--run RUN] [flags]
Says how the TPU is and, where it is ready, how the run is on every worker: none, running, lost (gone without an exit
code, as after a reboot) or its exit code. 75 means: preempted, and saved.'
FLAGS="$TPU_FLAGS --kind $SSH_FLAGS --run"
parse "$@"
need_tpu
need_no_words

state=$(tpu_state)
if [[ -z $DRY_RUN ]]; then printf '%s is %s\n' "$NAME" "$state"; fi
if [[ $DRY_RUN || $state == READY ]]; then run_status; fi
