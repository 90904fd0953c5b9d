#!/usr/bin/env bash
# Tests and measures Pregate's CUDA kernels on this machine. Needs its driver
# (550 or newer) and nothing else; takes less than nine minutes. Everything goes
# to one file, whose end is a short table.
#
# gpu-check.sh [--stand-in] [FILE]
#
# --stand-in: over the stand-in for the driver that this folder brings, to try
# this script where there is no GPU; its figures mean nothing. FILE: what to
# write (gpu-check.txt in $OUT, else here).
set -u
cd "$(dirname "$0")"

stand_in=
if [ "${1:-}" = --stand-in ]; then stand_in=1; shift; fi
file=${1:-${OUT:-$PWD}/gpu-check.txt}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
: >"$work/table"
failed=0

# The whole run ends before this many seconds, whatever hangs.
limit=520
# Runs a command for at most $1 seconds, or what is left of the limit.
within() {
  local most=$1 left=$((limit - SECONDS))
  shift
  [ "$left" -lt 5 ] && { echo "no time left"; return 124; }
  timeout --kill-after=10 "$((most < left ? most : left))" "$@"
}
section() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
row() { printf '%-38s %s\n' "$1" "$2" >>"$work/table"; }
bad() { failed=1; row "$1" "FAILED: $2"; }

check_machine() {
  section 'machine'
  date -u '+%Y-%m-%d %H:%M UTC'
  cat version.txt
  uname -srm
  grep -m1 'model name' /proc/cpuinfo
  row 'version' "$(head -n 1 version.txt)"
  if command -v nvidia-smi >/dev/null; then
    within 20 nvidia-smi
    within 20 nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm,clocks.max.mem --format=csv
    row 'device' "$(within 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1)"
  fi
  if within 60 bin/pregate doctor; then
    row 'pregate doctor' 'ok'
  else
    bad 'pregate doctor' "exit code $?"
  fi
}

# The processor gives the bits of the machine that packed this.
check_processor() {
  section 'small models on the processor'
  local model name count=0 expected
  for model in models/*.gguf; do
    name=$(basename "$model" .gguf)
    expected=$(grep " $name\$" models/expected.txt | cut -d' ' -f1)
    [ -n "$expected" ] || continue
    within 30 bin/pregate eval logits --model "$model" --tokens models/tokens.json \
      --out "$work/logits" >/dev/null || { bad "$name on the processor" 'does not run'; continue; }
    if [ "$(sha256sum <"$work/logits" | cut -d' ' -f1)" = "$expected" ]; then
      count=$((count + 1))
    else
      bad "$name on the processor" 'other logits than where this was packed'
    fi
  done
  row 'small models, processor' "$count have the expected bits"
}

check_kernels() {
  local test name result
  for test in tests/cuda_*; do
    name=$(basename "$test")
    section "$name"
    local since=$SECONDS
    within 100 "$test" --test-threads 2 2>&1 | tee "$work/log"
    result=$(grep -m1 '^test result:' "$work/log")
    case "$result" in
      *' ok. 0 passed'*) bad "$name" 'no test in it' ;;
      *' ok. '*) row "$name" "$(grep -o '[0-9]* passed' <<<"$result"), $((SECONDS - since)) s" ;;
      '') bad "$name" 'ended without a result' ;;
      *) bad "$name" "$(grep -o '[0-9]* failed' <<<"$result"): $(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$work/log" | head -n 3 | paste -sd' ')" ;;
    esac
  done
}

find_sanitizer() {
  local found
  for found in compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer \
    /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/cuda/bin/compute-sanitizer; do
    command -v "$found" && return
  done
  return 1
}

# Every kernel once, with small shapes, under each tool.
check_sanitizer() {
  local sanitizer tool
  if [ -n "$stand_in" ] || ! sanitizer=$(find_sanitizer); then
    row 'compute-sanitizer' 'not found: not run'
    return
  fi
  for tool in memcheck racecheck synccheck; do
    section "compute-sanitizer $tool"
    within 60 "$sanitizer" --tool "$tool" --error-exitcode 9 bin/gpu_bench --once 2>&1 | tee "$work/log"
    local status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then
      row "$tool" "$(grep -o 'ERROR SUMMARY.*\|RACECHECK SUMMARY.*' "$work/log" | tail -n 1)"
    else
      bad "$tool" "exit code $status"
    fi
  done
}

measure() {
  section 'measurements'
  within 200 bin/gpu_bench 2>&1 | tee "$work/bench"
  [ "${PIPESTATUS[0]}" = 0 ] || bad 'measurements' 'did not end well'
  # What stands behind this line is for the table.
  sed -n '/^-- table$/,$p' "$work/bench" | tail -n +2 >>"$work/table"
}

all() {
  check_machine
  check_processor
  check_kernels
  check_sanitizer
  measure
  printf '\n== result (%ss)\n' "$SECONDS"
  cat "$work/table"
  if [ "$failed" = 0 ]; then echo 'gpu-check: all passed'; else echo 'gpu-check: FAILED'; fi
}

if [ -n "$stand_in" ]; then
  echo 'over the stand-in: figures mean nothing'
else
  export PREGATE_TEST_GPU=1
fi
# In this shell, not behind a pipe: `failed` is the exit code.
exec 3>&1
mkfifo "$work/pipe"
tee "$file" <"$work/pipe" >&3 &
tee=$!
all >"$work/pipe" 2>&1
wait "$tee"
exit "$failed"
