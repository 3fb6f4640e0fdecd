#!/usr/bin/env bash
# Asks for a TPU.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

USAGE='create.sh --name NAME --zone ZONE --accelerator TYPE [flags]
Asks for a TPU: a queued resource, which waits for its turn, or a TPU VM at once.'
FLAGS="$TPU_FLAGS $CREATE_FLAGS --wait --poll"
parse "$@"
need_tpu
need_no_words

create_tpu
if [[ $WAIT ]]; then await_tpu; fi
