#!/usr/bin/env bash
# Starts a command on every worker.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='launch.sh --name NAME --zone ZONE [--run RUN] [flags] -- COMMAND…
Starts the command on every worker, in ~/gold_jax and with the environment of install.sh, detached: the end of the ssh
connection does not reach it. What it prints goes to ~/gold_jax_runs/RUN/log, its exit code to exit_code beside it.'
FLAGS="$TPU_FLAGS $SSH_FLAGS --run"
parse "$@"
need_command
need_tpu

launch_run "${COMMAND[@]}"
