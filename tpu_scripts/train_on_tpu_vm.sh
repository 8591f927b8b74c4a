#!/usr/bin/env bash
# Trains on a TPU VM or on all hosts of a slice: copies this checkout there,
# installs it, and starts `codet5p train` so that it outlives the connection and
# is started again if it ends before it is done (see keep_running.sh).
#
#   tpu_scripts/train_on_tpu_vm.sh [--print] NAME ZONE ARGUMENTS...
#
# NAME and ZONE are those of a TPU VM that is running; ARGUMENTS are those of
# `codet5p train`. --print only shows the commands. Needs gcloud. On several
# hosts, folders must be on a file system that all of them have mounted.
#
#   tpu_scripts/train_on_tpu_vm.sh my-v5e us-west4-a \
#     --gin_file=models/t5_220m.gin --gin_file=runs/finetune.gin \
#     DATA_DIR=pairs VOCABULARY_DIR=vocabulary RUN_DIR=runs/finetuned
set -euo pipefail

print=false
if [ "${1:-}" = --print ]; then
  print=true
  shift
fi
if [ $# -lt 3 ]; then
  echo "expected NAME ZONE ARGUMENTS..., found $# words; see the head of $0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf '%q ' "$@")
root=$(cd "$(dirname "$0")/.." && pwd)

run() {
  if $print; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if ! $print && ! command -v gcloud >/dev/null; then
  echo 'expected gcloud, found none; install the Google Cloud command line' >&2
  exit 2
fi
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
run git -C "$root" archive --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:codet5p_jax.tar.gz" \
  --zone="$zone" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" \
  --worker=all --command="
set -e
mkdir -p codet5p_jax
tar xzf codet5p_jax.tar.gz -C codet5p_jax
cd codet5p_jax
test -x .venv/bin/python || python3 -m venv .venv
grep -v ^libtpu constraints.txt >constraints.tpu.txt  # JAX brings its own.
.venv/bin/pip install --quiet --constraint constraints.tpu.txt '.[tpu]'
nohup tpu_scripts/keep_running.sh .venv/bin/codet5p train $arguments \\
  >>train.log 2>&1 </dev/null &
echo 'Started; follow it with: tail -f codet5p_jax/train.log'
"
