#!/usr/bin/env bash
# Copies results to this machine.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='fetch.sh SOURCE [DESTINATION] [--name NAME --zone ZONE] [--worker N] [flags]
Copies SOURCE into the folder DESTINATION (default: the current one): gs://… from its bucket, any other path from a
worker. A relative path lies under ~/gold_jax, where runs run; the log of one is ~/gold_jax_runs/RUN/log.'
FLAGS="$TPU_FLAGS $SSH_FLAGS --worker"
parse "$@"
count=${#POSITIONAL[@]}
if ((count < 1 || count > 2)); then die "one or two paths are needed: fetch.sh SOURCE [DESTINATION]"; fi
source=${POSITIONAL[0]}
destination=${POSITIONAL[1]:-.}

if [[ $source == gs://* ]]; then
  need_gcloud
  project=()
  if [[ $PROJECT ]]; then project=(--project="$PROJECT"); fi
  call mkdir -p "$destination"
  call gcloud storage cp --recursive "$source" "$destination" ${project[@]+"${project[@]}"}
else
  need_tpu
  if [[ $WORKER == all ]]; then die "--worker is all: one worker's files at a time"; fi
  case $source in
  /*) ;;
  '~'/*) source=${source#'~/'} ;; # ssh begins at home
  *) source=gold_jax/$source ;;
  esac
  call mkdir -p "$destination"
  remote scp "$NAME:$source" "$destination" --recurse --worker="$WORKER"
fi
