#!/usr/bin/env bash
# Tests and measures Pregate on this machine's GPU. Needs its driver (550 or
# newer), for the speed of models Python 3.9 too, and nothing else. Everything
# goes to one file, whose end is a short table; speeds also to speed-*.jsonl
# and speed-*.md beside it.
#
# gpu-check.sh [--part NAME]... [--llama FOLDER] [--limit SECONDS] [--stand-in] [FILE]
#
# --part: identity (50 ways to place a model's experts give the bits of the
# processor), bench-qwen, bench-olmoe (speed of models of these shapes), kernels
# (every kernel's tests, the sanitizer, its speed); in the order given; without
# it all of them in this order. --llama: a folder with llama-bench, which is then
# measured at the same GPU memory. --limit: the whole ends before that, whatever
# hangs (520; 1100 without --part). --stand-in: over the stand-in for the driver
# that this folder brings, to try this script where there is no GPU; its figures
# mean nothing. FILE: what to write (gpu-check.txt in $OUT, else here).
set -u
# As the caller names it, not as seen from here.
absolute() { realpath -m -- "$1"; }

stand_in= limit= llama= file= parts=()
while [ $# -gt 0 ]; do
  case "$1" in
    --stand-in) stand_in=1; shift; continue ;;
    --part|--llama|--limit) [ $# -ge 2 ] || { echo "$1 what?" >&2; exit 2; } ;;
    -*) echo "gpu-check.sh: $1: no such option" >&2; exit 2 ;;
    *) file=$(absolute "$1"); shift; continue ;;
  esac
  case "$1 $2" in
    '--part identity'|'--part bench-qwen'|'--part bench-olmoe'|'--part kernels') parts+=("$2") ;;
    '--llama '*) llama=$(absolute "$2") ;;
    '--limit '*[!0-9]*|'--limit '|'--part '*) echo "gpu-check.sh: $1 $2?" >&2; exit 2 ;;
    '--limit '*) limit=$2 ;;
  esac
  shift 2
done
cd "$(dirname "$0")" || exit 1
if [ ${#parts[@]} = 0 ]; then
  parts=(identity bench-qwen bench-olmoe kernels)
  limit=${limit:-1100}
fi
limit=${limit:-520}
file=${file:-$(absolute "${OUT:-$PWD}/gpu-check.txt")}
mkdir -p -- "$(dirname "$file")" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
: >"$work/table"
failed=0

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

# The test programs that are named.
check_tests() {
  local test name result
  for test in "$@"; do
    name=$(basename "$test")
    section "$name"
    local since=$SECONDS
    # Kernels that wait for the host are alone on the device: what another test
    # allocates or loads would wait for them, and they for their test.
    local threads=2
    case "$name" in cuda_mailbox|gpu_identity) threads=1 ;; esac
    # The stand-in computes on the processor, and looks at every access.
    within "$([ -n "$stand_in" ] && echo "$limit" || echo 100)" \
      "$test" --test-threads "$threads" 2>&1 | tee "$work/log"
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

# Speed of models of the shape $1.
check_speed() {
  section "speed: $1"
  local left=$((limit - SECONDS - 15)) most=450
  within "$((most + 10))" python3 speed.py "$1" --pregate bin/pregate --random-model bin/random_model \
    --out "$(dirname "$file")" --limit "$((left < most ? left : most))" \
    --version "$(head -n 1 version.txt)" ${llama:+--llama "$llama"} 2>&1 | tee "$work/log"
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || bad "speed: $1" "exit code $status"
  # Rows of the Markdown table that have figures.
  grep '^| [ul]' "$work/log" >>"$work/table"
}

check() {
  case "$1" in
    identity) check_tests tests/gpu_identity ;;
    # The stand-in is slow.
    bench-*) if [ -n "$stand_in" ]; then check_speed tiny; else check_speed "${1#bench-}"; fi ;;
    kernels)
      check_tests tests/cuda_*
      check_sanitizer
      measure
      ;;
  esac
}

all() {
  local part
  check_machine
  check_processor
  for part in "${parts[@]}"; do check "$part"; done
  printf '\n== result (%ss)\n' "$SECONDS"
  cat "$work/table"
  if [ "$failed" = 0 ]; then echo 'gpu-check: all passed'; else echo 'gpu-check: FAILED'; fi
}

if [ -n "$stand_in" ]; then
  export LD_LIBRARY_PATH=$PWD/stand-in
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
