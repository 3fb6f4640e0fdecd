#!/usr/bin/env bash
# Deletes the TPU.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='delete.sh --name NAME --zone ZONE [--kind KIND] [--yes] [flags]
Deletes the TPU with everything on its disks; what lies on gs:// stays. gcloud asks first, unless --yes is given.'
FLAGS="$TPU_FLAGS --kind --yes"
parse "$@"
need_tpu
need_no_words

if [[ $YES ]]; then delete_tpu --quiet; else delete_tpu; fi
