#!/usr/bin/env bash
# Installs the project on every worker.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='install.sh --name NAME --zone ZONE [--repo URL [--ref REF]] [flags]
Copies this checkout to ~/gold_jax on every worker, or clones a repository there, makes a virtual environment in
~/gold_jax_venv and installs the project with its TPU extra. Again, it brings the workers up to date. Of the checkout
go what an installation needs and configs/: a YAML file of your own belongs there.'
FLAGS="$TPU_FLAGS $INSTALL_FLAGS $SSH_FLAGS"
parse "$@"
need_tpu
need_no_words

install_project
