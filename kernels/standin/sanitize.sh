#!/usr/bin/env bash
# Runs `cargo test` with the kernels and the stand-in driver under the address
# sanitizer, in the place of the stand-in's own checks:
#   kernels/standin/sanitize.sh -p pregate-kernels --test cuda_experts
set -euo pipefail
compiler=${CXX:-c++}
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export PREGATE_STANDIN_SANITIZE=address PREGATE_REQUIRE_STANDIN=1
# Threads of the standard library and of Rust's test harness hold memory at the
# end; what kernels leak cannot be: they allocate nothing.
export ASAN_OPTIONS="detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export "CARGO_TARGET_${host}_RUNNER=env LD_PRELOAD=${libraries// /:}"
exec cargo test "$@"
