#!/usr/bin/env bash
# Downloads the files of one model repository that this program reads, and no others, from the Hugging Face hub.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash hfd.sh OWNER/REPOSITORY[/FILE] [FOLDER] [--dry_run]

Downloads a model to FOLDER/REPOSITORY; FOLDER is the current directory if it is left out. The program looks for
models in `checkpoints` (model_root in the configuration, or the environment variable DUMMY_FORCING_ROOT), so:

  bash hfd.sh Wan-AI/Wan2.1-T2V-1.3B checkpoints
  bash hfd.sh gdhe17/Self-Forcing checkpoints
  bash hfd.sh Efficient-Large-Model/LongLive-1.3B checkpoints
  bash hfd.sh zhuhz22/Causal-Forcing checkpoints
  bash hfd.sh JiaqiFeng/OneForcing checkpoints
  bash hfd.sh JunhaoZhuang/Self_Gradient_Forcing checkpoints
  bash hfd.sh MeiGen-AI/OPSD-V checkpoints
  bash hfd.sh SOTAmak1r/Infinite-Forcing checkpoints
  bash hfd.sh JaydenLu666/Reward-Forcing-T2V-1.3B checkpoints
  bash hfd.sh TencentARC/RollingForcing checkpoints
  bash hfd.sh Wan-AI/Wan2.1-T2V-14B checkpoints

Of these only the files that the program reads are downloaded; of any other repository, all; with FILE, that one alone
(such as zhuhz22/Causal-Forcing/framewise/causal_forcing.pt). A download that was broken off goes on where it stopped
when the command is run again. Licences are on each model's page: read them. docs/checkpoints.md says what runs them.

  --dry_run   print the repository, the files and the folder; download nothing
  --help      print this

Environment: HF_TOKEN (for gated repositories), HF_ENDPOINT (a mirror of the hub), PYTHON (the interpreter that has
huggingface_hub; the `hf` command is used if none has).
EOF
}

# One line an argument.
fail() {
  printf 'hfd.sh: %s\n' "$1" >&2
  shift
  if (($# > 0)); then printf '%s\n' "$@" >&2; fi
  exit 1
}

misuse() {
  printf 'hfd.sh: %s\n\n' "$*" >&2
  usage >&2
  exit 2
}

# Sets `patterns` (which files) and `size_gb` (their size together, rounded up; 0 where it is not known). The files are
# those of wan/checkpoints/published.py.
describe() {
  case "$1" in
    Wan-AI/Wan2.1-T2V-*)
      patterns=('config.json' 'diffusion_pytorch_model*' 'Wan2.1_VAE.pth' 'models_t5*.pth' 'google/umt5-xxl/*')
      if [[ $1 == *-14B ]]; then size_gb=70; else size_gb=18; fi
      ;;
    gdhe17/Self-Forcing) patterns=('checkpoints/self_forcing_dmd.pt') size_gb=6 ;;
    Efficient-Large-Model/LongLive-1.3B) patterns=('models/*.pt') size_gb=9 ;;
    zhuhz22/Causal-Forcing)
      patterns=('chunkwise/causal_forcing.pt' 'framewise/causal_forcing.pt' 'causal-forcing++/framewise-2step.pt')
      patterns+=('causal-forcing++/framewise-1step.pt' 'chunkwise/longvideo.pt') size_gb=30
      ;;
    JiaqiFeng/OneForcing) patterns=('checkpoints/one_forcing.pt') size_gb=0 ;;
    JunhaoZhuang/Self_Gradient_Forcing) patterns=('framewise/ar/model.pt' 'chunkwise/ar/model.pt') size_gb=0 ;;
    MeiGen-AI/OPSD-V)
      patterns=('checkpoints/self_forcing_dmd_ema_as_generator.pt' 'checkpoints/opsdv_self_forcing_lora.pt')
      patterns+=('checkpoints/longlive_base.pt' 'checkpoints/opsdv_longlive_lora.pt') size_gb=0
      ;;
    SOTAmak1r/Infinite-Forcing) patterns=('ema_model.pt') size_gb=0 ;;
    JaydenLu666/Reward-Forcing-T2V-1.3B) patterns=('rewardforcing.pt') size_gb=0 ;;
    TencentARC/RollingForcing) patterns=('checkpoints/rolling_forcing_dmd.pt') size_gb=0 ;;
    *) patterns=() size_gb=0 ;;
  esac
}

# Kilobytes of an existing folder, 0 for one that is not there.
kilobytes_in() {
  if [[ -d $1 ]]; then du -sk "$1" | cut -f1; else echo 0; fi
}

check_space() {
  local parent=$1 have need free
  while [[ ! -d $parent ]]; do parent=$(dirname "$parent"); done
  have=$(kilobytes_in "$1")
  need=$((size_gb * 1000 * 1000 - have))
  free=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')
  if ((need > free)); then
    fail "not enough space in $parent: about $((need / 1000000)) GB are needed, $((free / 1000000)) GB are free." \
      "Free some, or name a folder on another disk: bash hfd.sh $repository FOLDER"
  fi
}

find_downloader() {
  python=${PYTHON:-$(command -v python3 || command -v python || true)}
  if [[ -n $python ]] && "$python" -c 'import huggingface_hub' >/dev/null 2>&1; then
    downloader=python
  elif command -v hf >/dev/null 2>&1; then
    downloader=hf
  else
    fail "huggingface_hub is not installed for ${python:-any Python}. Run: pip install huggingface_hub" \
      "(it is in requirements.txt; activate the environment first, or set PYTHON)."
  fi
}

download_with_python() {
  "$python" -c '
import sys
from huggingface_hub import snapshot_download
try:
    snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=sys.argv[3:] or None)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
' "$repository" "$target" ${patterns[@]+"${patterns[@]}"}
}

# One pattern a call: older and newer `hf` take several in different ways.
download_with_hf() {
  local pattern
  if ((${#patterns[@]} == 0)); then
    hf download "$repository" --local-dir "$target"
    return
  fi
  for pattern in "${patterns[@]}"; do
    hf download "$repository" --include "$pattern" --local-dir "$target" || return 1
  done
}

# Says what the hub's client meant; its own words are above.
explain() {
  local endpoint=${HF_ENDPOINT:-https://huggingface.co}
  case "$(tr '[:upper:]' '[:lower:]' <"$1")" in
    *"no space left"*) fail "the disk is full. Free some space in $target and run the same command again." ;;
    # First, because the hub answers 401 for repositories that are not there.
    *"repository not found"* | *"' not found"* | *repositorynotfound* | *"404 client"*)
      fail "the hub has no repository $repository, or it is private." \
        "Check the spelling; for a private one: HF_TOKEN=hf_... bash hfd.sh $repository $root"
      ;;
    *"gated repo"* | *gatedrepo* | *"401 client"* | *"403 client"* | *unauthorized* | *forbidden* | *"access denied"*)
      fail "the hub refused access to $repository." \
        "Open $endpoint/$repository, accept its terms, make a token ($endpoint/settings/tokens), and run:" \
        "HF_TOKEN=hf_... bash hfd.sh $repository $root"
      ;;
    *"local entry not found"* | *localentrynotfound* | *"connection"* | *connecterror* | *"name resolution"* | *"timed out"* | *offline*)
      fail "$endpoint cannot be reached or does not answer. Check the network (HF_HUB_OFFLINE must not be 1), or a mirror:" \
        "HF_ENDPOINT=https://... bash hfd.sh $repository $root" \
        "What was downloaded so far is kept; run the same command again to go on."
      ;;
    *) fail "the download of $repository failed; see above. Run the same command again to go on where it stopped." ;;
  esac
}

repository='' root='' dry_run=0
for argument in "$@"; do
  case "$argument" in
    --help | -h)
      usage
      exit 0
      ;;
    --dry_run | --dry-run) dry_run=1 ;;
    -*) misuse "there is no option $argument." ;;
    *)
      if [[ -z $repository ]]; then
        repository=$argument
      elif [[ -z $root ]]; then
        root=$argument
      else
        misuse "too many arguments: $argument."
      fi
      ;;
  esac
done
[[ -n $repository ]] || misuse "which repository?"
[[ $repository =~ ^([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(/([A-Za-z0-9._+/-]*[A-Za-z0-9]))?$ ]] ||
  misuse "'$repository' is not of the form OWNER/REPOSITORY or OWNER/REPOSITORY/FILE."
repository=${BASH_REMATCH[1]} file=${BASH_REMATCH[3]}
root=${root:-.}
target=$root/${repository#*/}

describe "$repository"
if [[ -n $file ]]; then patterns=("$file") size_gb=0; fi
printf 'repository: %s\n' "$repository"
printf 'files:      %s\n' "${patterns[*]:-all}"
if ((size_gb > 0)); then printf 'size:       about %s GB\n' "$size_gb"; fi
printf 'folder:     %s\n' "$target"
if ((dry_run)); then exit 0; fi

find_downloader
check_space "$target"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Progress bars and messages go to the terminal as they come, and to the log for explain().
if ! { "download_with_$downloader" 2>&1 1>&3 | tee "$log" >&2; } 3>&1; then explain "$log"; fi
printf 'Done: %s\n' "$target"
