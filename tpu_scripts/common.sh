# shellcheck shell=bash
# What the scripts share: settings, flags and errors; tpu.sh has the calls to gcloud. Sourced, never run.
# Kept to bash 3.2, which is what a Mac has.
# shellcheck disable=SC2034 # what is set here is read there

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings: a flag wins over the environment ----

NAME=${GOLD_TPU_NAME:-}
ZONE=${GOLD_TPU_ZONE:-}
PROJECT=${GOLD_TPU_PROJECT:-}
ACCELERATOR=${GOLD_TPU_ACCELERATOR:-}
RUNTIME=${GOLD_TPU_RUNTIME:-}
KIND=${GOLD_TPU_KIND:-queued}
CAPACITY=${GOLD_TPU_CAPACITY:-on-demand}
RUN=${GOLD_TPU_RUN:-gold}
BATCH_SIZE=${GOLD_TPU_BATCH_SIZE:-}
POLL=${GOLD_TPU_POLL:-60}
REPO='' REF='' WORKER=0 LINES_SHOWN=100 MAX_RESTARTS=100
WAIT='' NO_FOLLOW='' YES='' DRY_RUN=''
CREATE_ARGS=() SSH_ARGS=() POSITIONAL=() COMMAND=()

# One line for each flag: flag|placeholder of its value, empty for a switch|help. Nothing else knows what flags there are.
FLAG_TABLE='--name|NAME|the TPU VM, and the queued resource that it comes from (GOLD_TPU_NAME)
--zone|ZONE|where, such as us-east5-b (GOLD_TPU_ZONE)
--project|PROJECT|the Google Cloud project (GOLD_TPU_PROJECT); without it the one gcloud is set to
--kind|KIND|queued: a queued resource (default); vm: a TPU VM at once, or an error (GOLD_TPU_KIND)
--accelerator|TYPE|v4-N, v5p-N (cores), v5litepod-N or v5e-N, v6e-N (chips) (GOLD_TPU_ACCELERATOR)
--runtime|VERSION|software version of the VM; by default the one of the accelerator (GOLD_TPU_RUNTIME)
--capacity|CAPACITY|on-demand (default), spot or reserved (GOLD_TPU_CAPACITY)
--spot||the same as --capacity spot
--reserved||the same as --capacity reserved
--create-arg|ARG|one more argument for gcloud … create, such as --network=NET; may be repeated
--wait||stay until the TPU is ready
--ssh-arg|ARG|one more argument for gcloud … ssh and scp, such as --internal-ip; may be repeated
--batch-size|N|at most N workers at a time; takes the alpha commands of gcloud (GOLD_TPU_BATCH_SIZE)
--repo|URL|clone this repository on the workers; without it this checkout is copied
--ref|REF|branch or tag of --repo
--run|RUN|name of the run; its log and exit code lie in ~/gold_jax_runs/RUN (GOLD_TPU_RUN, default gold)
--worker|N|which worker (default 0)
--lines|N|how many lines of the log to begin with (default 100)
--no-follow||print these lines and end
--poll|SECONDS|how long to wait between two looks (GOLD_TPU_POLL, default 60)
--max-restarts|N|give up after N restarts (default 100)
--yes||do not ask
--dry-run||print the commands, call nothing
--help||this text'

# ---- messages ----

say() { printf '%s\n' "$*" >&2; }
die() {
  say "${0##*/}: $*"
  exit 2
}

# The text as one word of any POSIX shell.
quoted() {
  local rest=$1 out=''
  if [[ $rest =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf '%s' "$rest"
    return
  fi
  while [[ $rest == *\'* ]]; do
    out+="${rest%%\'*}'\\''"
    rest=${rest#*\'}
  done
  printf "'%s'" "$out$rest"
}

command_line() {
  local word between=''
  for word in "$@"; do
    printf '%s' "$between"
    quoted "$word"
    between=' '
  done
}

exec 3>&1 # so that a dry run is heard from inside $(…)

# Runs a command; in a dry run prints it.
call() {
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(command_line "$@")" >&3
  else
    "$@" 3>&-
  fi
}

# In a dry run, a comment between the commands.
note() { if [[ $DRY_RUN ]]; then printf '# %s\n' "$*" >&3; fi; }

# Levenshtein distance.
distance() {
  local a=$1 b=$2 i j cost best above left
  local row=()
  for ((j = 0; j <= ${#b}; j++)); do row[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    above=${row[0]} row[0]=$i
    for ((j = 1; j <= ${#b}; j++)); do
      cost=1
      if [[ ${a:i-1:1} == "${b:j-1:1}" ]]; then cost=0; fi
      best=$((above + cost)) above=${row[j]} left=${row[j - 1]}
      if ((above + 1 < best)); then best=$((above + 1)); fi
      if ((left + 1 < best)); then best=$((left + 1)); fi
      row[j]=$best
    done
  done
  echo "${row[${#b}]}"
}

# nearest WORD CANDIDATE…
nearest() {
  local word=$1 candidate found='' least=999 d
  shift
  for candidate in "$@"; do
    d=$(distance "$word" "$candidate")
    if ((d < least)); then least=$d found=$candidate; fi
  done
  echo "$found"
}

# ---- flags ----

# Flags of groups, for the scripts to say what they take.
TPU_FLAGS='--name --zone --project'
CREATE_FLAGS='--kind --accelerator --runtime --capacity --spot --reserved --create-arg'
INSTALL_FLAGS='--repo --ref'
SSH_FLAGS='--ssh-arg --batch-size'
LAST_FLAGS='--dry-run --help'

usage() {
  local flag placeholder text
  printf '%s\n\n' "$USAGE"
  while IFS='|' read -r flag placeholder text; do
    if [[ " $FLAGS $LAST_FLAGS " == *" $flag "* ]]; then printf '  %-24s %s\n' "$flag $placeholder" "$text"; fi
  done <<<"$FLAG_TABLE"
}

# parse "$@": sets the variables above. Words without a flag go to POSITIONAL, what follows -- to COMMAND.
# The script has set USAGE, its text, and FLAGS, the flags that it takes beside --dry-run and --help.
parse() {
  local flag value given row placeholder
  while (($#)); do
    flag=$1 value='' given=''
    shift
    if [[ $flag == -- ]]; then
      COMMAND=("$@")
      break
    elif [[ $flag != -* ]]; then
      if [[ $USAGE == *' -- COMMAND'* ]]; then die "the command goes behind --: ${0##*/} … -- $(quoted "$flag") …"; fi
      POSITIONAL+=("$flag")
      continue
    elif [[ $flag == --*=* ]]; then
      given=1 value=${flag#*=} flag=${flag%%=*}
    elif [[ $flag == -h ]]; then
      flag=--help
    fi
    if [[ " $FLAGS $LAST_FLAGS " != *" $flag "* ]]; then
      # shellcheck disable=SC2086 # words are what is wanted
      die "unknown flag $flag; the nearest is $(nearest "$flag" $FLAGS $LAST_FLAGS) (--help lists them)"
    fi
    row=$(grep -e "^$flag|" <<<"$FLAG_TABLE")
    placeholder=${row#*|} placeholder=${placeholder%%|*}
    if [[ -z $placeholder ]]; then
      if [[ $given ]]; then die "$flag takes no value, got $(quoted "$value")"; fi
    elif [[ -z $given ]]; then
      if (($# == 0)) || [[ $1 == -- ]]; then die "$flag needs a value: $flag $placeholder"; fi
      value=$1
      shift
    fi
    case $flag in
    --help)
      usage
      exit 0
      ;;
    --name) NAME=$value ;;
    --zone) ZONE=$value ;;
    --project) PROJECT=$value ;;
    --kind) KIND=$value ;;
    --accelerator) ACCELERATOR=$value ;;
    --runtime) RUNTIME=$value ;;
    --capacity) CAPACITY=$value ;;
    --spot | --reserved) CAPACITY=${flag#--} ;;
    --create-arg) CREATE_ARGS+=("$value") ;;
    --wait) WAIT=1 ;;
    --ssh-arg) SSH_ARGS+=("$value") ;;
    --batch-size) BATCH_SIZE=$value ;;
    --repo) REPO=$value ;;
    --ref) REF=$value ;;
    --run) RUN=$value ;;
    --worker) WORKER=$value ;;
    --lines) LINES_SHOWN=$value ;;
    --no-follow) NO_FOLLOW=1 ;;
    --poll) POLL=$value ;;
    --max-restarts) MAX_RESTARTS=$value ;;
    --yes) YES=1 ;;
    --dry-run) DRY_RUN=1 ;;
    esac
  done
  check_settings
}

one_of() { # one_of FLAG VALUE CHOICE…
  local flag=$1 value=$2 choice
  shift 2
  for choice in "$@"; do if [[ $value == "$choice" ]]; then return; fi; done
  die "$flag is $(quoted "$value"), not one of: $*; the nearest is $(nearest "$value" "$@")"
}

whole_number() { if ! [[ $2 =~ ^[0-9]+$ ]]; then die "$1 is $(quoted "$2"), not a whole number"; fi; }

takes() { [[ " $FLAGS " == *" $1 "* ]]; }

check_settings() {
  if takes --kind; then one_of --kind "$KIND" queued vm; fi
  if takes --capacity; then one_of --capacity "$CAPACITY" on-demand spot reserved; fi
  if takes --accelerator; then check_accelerator; fi
  if takes --run && ! [[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then
    die "--run is $(quoted "$RUN"): letters, digits, '.', '_' and '-' only, as it names a folder"
  fi
  if [[ $REF && -z $REPO ]]; then die "--ref needs --repo"; fi
  if [[ $REPO == -* ]]; then die "--repo is $(quoted "$REPO"), not the address of a repository"; fi
  whole_number --poll "$POLL"
  whole_number --lines "$LINES_SHOWN"
  whole_number --max-restarts "$MAX_RESTARTS"
  if [[ $BATCH_SIZE ]]; then whole_number --batch-size "$BATCH_SIZE"; fi
  if [[ $WORKER != all ]]; then whole_number --worker "$WORKER"; fi
}

# What a script that speaks to a TPU cannot do without.
need_tpu() {
  if [[ -z $NAME ]]; then die "no name: give --name NAME or set GOLD_TPU_NAME"; fi
  if ! [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
    die "--name is $(quoted "$NAME"): small letters, digits and '-', a letter first, no '-' last"
  fi
  if [[ -z $ZONE ]]; then die "no zone: give --zone ZONE, such as us-east5-b, or set GOLD_TPU_ZONE"; fi
  need_gcloud
}

need_gcloud() {
  if [[ -z $DRY_RUN ]] && ! command -v gcloud >/dev/null; then
    die "gcloud is not on PATH: install the Google Cloud CLI, then gcloud auth login"
  fi
}

need_no_words() {
  local count=${#POSITIONAL[@]}
  if ((count)); then die "what is $(quoted "${POSITIONAL[0]}")? (--help)"; fi
  count=${#COMMAND[@]}
  if ((count)); then die "no command is expected here (--help)"; fi
}

need_command() {
  local count=${#COMMAND[@]}
  if ((count == 0)); then die "no command: ${0##*/} … -- python -m gold_jax.train --config …"; fi
}

# ---- accelerators ----

FAMILIES='v4 v5litepod v5p v6e'

# The sizes that a family is sold in: cores for v4 and v5p, chips for the others.
sizes() {
  local n last
  case $1 in
  v5litepod | v6e) echo 1 4 8 16 32 64 128 256 ;;
  v4 | v5p)
    if [[ $1 == v4 ]]; then last=4096; else last=12288; fi
    echo 8 16 32 64
    for ((n = 128; n <= last; n += 128)); do echo "$n"; done
    ;;
  esac
}

runtime_of() {
  case $1 in
  v4-*) echo tpu-ubuntu2204-base ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

check_accelerator() {
  local family size n gap least=999999 near=''
  if [[ -z $ACCELERATOR ]]; then die "no accelerator: give --accelerator TYPE, such as v5litepod-8, or set GOLD_TPU_ACCELERATOR"; fi
  ACCELERATOR=${ACCELERATOR/#v5e-/v5litepod-}
  family=${ACCELERATOR%-*} size=${ACCELERATOR##*-}
  if [[ " $FAMILIES " == *" $family "* && " $(sizes "$family" | tr '\n' ' ') " == *" $size "* ]]; then
    RUNTIME=${RUNTIME:-$(runtime_of "$ACCELERATOR")}
    return
  fi
  # shellcheck disable=SC2086 # words are what is wanted
  family=$(nearest "$family" $FAMILIES v5e)
  family=${family/#v5e/v5litepod}
  if ! [[ $size =~ ^[0-9]{1,6}$ ]]; then size=8; fi
  for n in $(sizes "$family"); do
    gap=$((10#$size > n ? 10#$size - n : n - 10#$size))
    if ((gap < least)); then least=$gap near=$n; fi
  done
  die "unknown accelerator type $(quoted "$ACCELERATOR"); the nearest is $family-$near (known: v4-N, v5litepod-N or v5e-N, v5p-N, v6e-N)"
}

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
