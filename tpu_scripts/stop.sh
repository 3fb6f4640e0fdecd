#!/usr/bin/env bash
# Ends a run.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='stop.sh --name NAME --zone ZONE [--run RUN] [flags]
Sends SIGTERM to a run on every worker: it saves and ends with exit code 75. End a resume.sh that watches it first, as
that would start it again.'
FLAGS="$TPU_FLAGS $SSH_FLAGS --run"
parse "$@"
need_tpu
need_no_words

on_workers all "$(worker_script stop "$RUN")"
