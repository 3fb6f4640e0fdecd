#!/usr/bin/env bash
# Follows the log of a run.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='logs.sh --name NAME --zone ZONE [--run RUN] [--worker N] [flags]
Follows the log of a run on one worker, until Ctrl-C.'
FLAGS="$TPU_FLAGS $SSH_FLAGS --run --worker --lines --no-follow"
parse "$@"
need_tpu
need_no_words

follow=-F
if [[ $NO_FOLLOW ]]; then follow=''; fi
on_workers "$WORKER" "tail -n $LINES_SHOWN ${follow:+$follow }gold_jax_runs/$RUN/log"
