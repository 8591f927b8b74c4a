#!/usr/bin/env bash
# Runs a command until it is done. A run of `codet5p train` that is started
# again goes on from its newest checkpoint.
#
#   tpu_scripts/keep_running.sh .venv/bin/codet5p train ARGUMENTS...
#
# Ends with the command's status when that is 0 (done), 2 (a mistake to mend) or
# 130 (Control-C), or when this script was told to end, which it passes on. After
# 75 (saved, since the machine is to be taken away) it starts the command again
# at once, after any other failure in RESTART_SECONDS (10). It gives up when the
# status and the last line of the command were the same, but for numbers,
# MAX_SAME_FAILURES (3) times in a row; a run that lasted LONG_RUN_SECONDS (3600)
# begins a new row. It never gives up after 69 (something is missing that may
# come by itself, such as another host), which is no part of a row either.
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "expected a command, found none; see the head of $0" >&2
  exit 2
fi
restart_seconds=${RESTART_SECONDS:-10}
max_same_failures=${MAX_SAME_FAILURES:-3}
long_run_seconds=${LONG_RUN_SECONDS:-3600}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/errors"
child='' told_to_end=false
end() {
  told_to_end=true
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap end TERM INT HUP

# Passes on what the command says, and keeps its last line. Progress bars tell
# the time, and so are never the same; below its errors JAX has a note or a
# stack of C++, which always are.
relay() (
  # A signal to the whole group must not leave the command, which has a run to
  # save, without a reader.
  trap '' TERM INT HUP
  export LC_ALL=C  # The command may say anything.
  tee /dev/fd/3 <"$scratch/errors" 3>&1 >&2 |
    tr '\r' '\n' |
    grep -av -e '%|' -e '^-*$' -e '^For simplicity, JAX has removed' \
      -e '^ *@ *0x' -e '^\*\*\* Check failure stack trace' |
    tail -n 1 >"$scratch/last"
)

same=0 former='' missing=0
while true; do
  relay &
  relay=$!
  SECONDS=0
  "$@" 2>"$scratch/errors" &
  child=$!
  if $told_to_end; then end; fi  # A moment ago, when there was no child.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"  # A signal to this script ends it early.
  done
  wait "$child"
  status=$?
  child=''
  while kill -0 "$relay" 2>/dev/null; do
    wait "$relay"
  done
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  if $told_to_end; then
    exit "$status"
  fi
  if [ "$status" -eq 75 ]; then
    same=0 former='' missing=0
    continue
  fi
  last=$(<"$scratch/last")
  if [ "$status" -eq 69 ]; then
    missing=$((missing + 1))
    times="$missing times in a row"
  else
    alike="$status $(LC_ALL=C sed -E 's/0x[0-9a-f]+|[0-9]+/#/g' <<<"$last")"
    [ "$SECONDS" -lt "$long_run_seconds" ] || former=''
    [ "$alike" = "$former" ] || same=0
    same=$((same + 1)) former=$alike missing=0
    times="$same times in a row"
    if [ "$same" -ge "$max_same_failures" ]; then
      echo "keep_running: gave up after status $status and the same last line" \
        "$times: $last" >&2
      exit "$status"
    fi
  fi
  echo "keep_running: status $status, $times; starting again in" \
    "$restart_seconds s" >&2
  sleep "$restart_seconds" &
  wait $!
  if $told_to_end; then
    exit "$status"
  fi
done
