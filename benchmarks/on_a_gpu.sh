#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes, most valuable first: build, self-test of the
# Hopper kernels, checks of memory and barriers, tests, times next to what was predicted, times of other
# implementations, a whole step of training. Needs a CUDA build of torch and the build requirements in the environment
# and nvcc on the PATH, and no network; compute-sanitizer comes with the CUDA toolkit.
#
#   benchmarks/on_a_gpu.sh --out FOLDER    run what has not passed yet for these sources
#     --again STEP    run a step again that has passed (several times; `all` for every step)
#     --only STEP     run no other steps (several times)
#     --at-most N     seconds for each step, where its own limit is longer
#     --long          afterwards, without the nine minutes: the slow tools, every test, every benchmark
#     --dry-run       only print the steps, their limits and their commands
#     --emulator      on the emulator instead of a GPU: the chain, not the numbers
#
# What a step prints goes to the screen and to FOLDER/STEP.log as it is printed, and results are saved as JSON in
# FOLDER, so that a run that is killed leaves what it had. FOLDER/state holds the outcome of each step with a hash of
# the sources and the commit; a build empties it. A step that fails, or reaches its limit, does not stop the next ones; the exit code is 1.
set -uo pipefail
set -m # each step in a process group of its own, which can be ended as a whole
cd "$(dirname "$0")/.." || exit 2

out="" long="" dry="" emulator="" most=99999 again=" " only=" "
while (($#)); do
  case $1 in
    --out | --again | --only | --at-most)
      (($# > 1)) || { echo "$1 needs a value: see the first lines of $0" >&2; exit 2; } ;;& # and the next match too
    --out) out=$2; shift ;;
    --again) again+="$2 "; shift ;;
    --only) only+="$2 "; shift ;;
    --at-most) most=$2; shift ;;
    --long) long=1 ;;
    --dry-run) dry=1 ;;
    --emulator) emulator=1 ;;
    *) echo "unknown option $1: see the first lines of $0" >&2; exit 2 ;;
  esac
  shift
done

[[ $most =~ ^[1-9][0-9]*$ ]] || { echo "--at-most needs whole seconds, got $most" >&2; exit 2; }

TOTAL=540 GRACE=5 # seconds: of the whole run without --long, and from the request to end a step to its end by force
steps=()
declare -A limit command
add() { # name, limit in seconds, command; exit code 77: left out, for the reason in its last line
  steps+=("$1") limit[$1]=$(($2 < most ? $2 : most)) command[$1]=$3
}

needs_sanitizer='command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on the PATH"; exit 77; }'
# without torch's cache, where an overrun of one tensor would end in the next unseen
sanitize="$needs_sanitizer; PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool"
small="python -m benchmarks.small_shapes --seconds"
# not through a pipe, whose end would be reported instead of the end of pyunlearn
info='about=$(pyunlearn info) && echo "$about" && { grep -q "Hopper kernels *used" <<< "$about" ||
  { echo "the Hopper kernels are not used: see above"; exit 1; }; }'
# the peers' shapes, until half of the limit is over: each is saved when it is done
peers='for shape in 8192,2048,128256 1024,2048,128256 8192,576,49152 8192,4096,128256; do
  if ((SECONDS > 20)); then echo "left out, for time: $shape"; continue; fi
  python -m benchmarks log_likelihood --device cuda --shapes $shape --modes full --masked 0 --rounds 5 \
    --save --out "$OUT/peers-$shape" || exit
done'
install='CCACHE_DISABLE=1 CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) pip install --no-build-isolation --no-deps --no-index .
  -C cmake.define.PYUNLEARN_CUDA=ON -C cmake.define.PYUNLEARN_HOPPER=ON'

if [[ -z $emulator ]]; then
  add build 110 "${install//$'\n'/}"
  add selftest 55 "$info"
  add forced 25 "export PYUNLEARN_HOPPER=1; $info"
  add memcheck 45 "$sanitize memcheck $small 25"
  add synccheck 35 "$sanitize synccheck $small 15"
  # "emulator" is named because tests/conftest.py leaves out what has that mark otherwise
  add tests 80 'pytest -o addopts="-ra --strict-markers" -v -n 4 --dist load --timeout 40 --junitxml "$OUT/tests.xml" \
    -m "cuda and not full and (emulator or not emulator)"'
  add predictions 45 'python -m benchmarks.predictions --out "$OUT/predictions.jsonl"'
  add peers 40 "$peers"
  # a whole step of training with random weights of 1B parameters: its folder keeps what a first run has done
  add step 60 'python -m benchmarks.step --device cuda --model 1b --dtype default,bfloat16 --methods npo --steps 10 \
    --run-steps 10 --save --out "$OUT/step"'
else
  emulated='python tests/emulator/run.py "$EMULATOR"'
  gpu_only='echo "means nothing without a GPU"; exit 77'
  add build 110 "$emulated pyunlearn info"
  add selftest 55 "$emulated selftest"
  add forced 25 "$gpu_only"
  add memcheck 45 "$emulated benchmarks.small_shapes --device cpu --seconds 2"
  add synccheck 35 "$gpu_only" # the emulator checks barriers and memory at once
  add tests 80 "$gpu_only"
  add predictions 45 "$emulated benchmarks.predictions --device cpu --shapes 24,64,300 --rounds 1 \
    --out \"\$OUT/predictions.jsonl\""
  add peers 60 "TORCHDYNAMO_DISABLE=1 $emulated benchmarks log_likelihood --device cpu --shapes 24,64,300 \
    --dtypes bfloat16 --modes forward --masked 0 --rounds 1 --save --out \"\$OUT/peers\""
  add step 40 "$gpu_only"
fi
if [[ -n $long && -z $emulator ]]; then
  TOTAL=0
  add racecheck 900 "$sanitize racecheck $small 600 --extra"
  add initcheck 900 "$sanitize initcheck $small 600 --extra"
  add memcheck-portable 900 "$sanitize memcheck $small 600 --extra --portable"
  add tests-full 1800 'pytest -o addopts="-ra --strict-markers" --junitxml "$OUT/tests-full.xml" \
    -m "cuda and (full or emulator or not full)"'
  for hopper in 0 1; do
    add "benchmarks-$hopper" 3600 "PYUNLEARN_HOPPER=$hopper python -m benchmarks --device cuda --save \
      --out \"\$OUT/benchmarks-$hopper\""
  done
fi
for name in $again $only; do
  [[ $name == all || -n ${limit[$name]-} ]] || { echo "no step $name: there are ${steps[*]}" >&2; exit 2; }
done

commit=$(git rev-parse --short HEAD 2> /dev/null || echo no-commit)
sources=$(find csrc pyunlearn benchmarks tests CMakeLists.txt pyproject.toml -type f \
  ! -path '*/__pycache__/*' ! -name '*.so' ! -path 'benchmarks/results/*' -print0 |
  sort -z | xargs -0 sha256sum | sha256sum)
key="${sources:0:12}${emulator:+-emulator}"

passed_before() { # step
  local outcome at
  read -r outcome at _ 2> /dev/null < "$out/state/$1" || return 1
  [[ $outcome == passed && $at == "$key" && $again != *" $1 "* && $again != *" all "* ]] || return 1
  # the results may have come from another machine
  [[ $1 != build || -n $emulator ]] ||
    (cd / && python -c "from pyunlearn import _C; _C.build_info()['hopper'] or exit(1)" 2> /dev/null)
}
chosen() { [[ $only == " " || $only == *" $1 "* ]]; }

if [[ -n $dry ]]; then
  for name in "${steps[@]}"; do
    chosen "$name" || continue
    [[ -n $out ]] && passed_before "$name" && note=", passed before: not run again" || note=""
    printf '%s (at most %d + %d s%s)\n  %s\n' "$name" "${limit[$name]}" "$GRACE" "$note" "${command[$name]}"
  done
  exit 0
fi
[[ -n $out ]] || { echo "--out FOLDER is needed: what is measured must not be lost" >&2; exit 2; }
mkdir -p "$out/state" || exit 2
out=$(realpath "$out")
export OUT=$out EMULATOR=${EMULATOR-$out/emulator} PYTHONUNBUFFERED=1
export PYTHONPATH=${emulator:+$PWD}${PYTHONPATH:+${emulator:+:}$PYTHONPATH}
{
  echo "commit $commit, sources $key, $(date -u +%FT%TZ), $(uname -n)"
  for about in "nvidia-smi" "nvcc --version" "python -m pip list"; do
    timeout 15 $about 2>&1 || echo "$about: not here"
  done
} > "$out/environment.txt"

failed=0 lines=() running="" name="" began=$SECONDS
table() {
  printf '\n%-18s %-14s %8s  %s\n' step outcome seconds log
  printf '%s\n' "${lines[@]}"
}
note() { # step, outcome, seconds
  lines+=("$(printf '%-18s %-14s %8s  %s' "$1" "$2" "$3" "$out/$1.log")")
  table > "$out/summary.txt"
}
stop() {
  trap '' INT TERM
  [[ -n $running ]] && kill -TERM -- "-$running" 2> /dev/null
  note "$name" "interrupted" "$((SECONDS - began))"
  table
  exit 1
}
trap stop INT TERM
for name in "${steps[@]}"; do
  chosen "$name" || continue
  began=$SECONDS
  if passed_before "$name"; then
    note "$name" "passed before" 0
    continue
  fi
  allowed=${limit[$name]}
  ((TOTAL == 0 || SECONDS + allowed + GRACE <= TOTAL)) || allowed=$((TOTAL - SECONDS - GRACE))
  if ((allowed < 5)); then
    note "$name" "no time left" 0
    failed=1
    continue
  fi
  printf '\n== %s (%d s, at most %d)\n' "$name" "$SECONDS" "$allowed"
  : > "$out/$name.log"
  timeout --signal INT --kill-after $GRACE "$allowed" bash -c "${command[$name]}" < /dev/null > "$out/$name.log" 2>&1 &
  running=$!
  tail --pid=$running -n +1 -s 0.2 -f "$out/$name.log" &
  shown=$!
  wait $running
  code=$?
  wait $shown
  running=""
  case $code in
    0) outcome=passed ;;
    77) outcome="left out" ;;
    124 | 137) outcome="over its limit" failed=1 ;;
    *) outcome="FAILED ($code)" failed=1 ;;
  esac
  note "$name" "$outcome" "$((SECONDS - began))"
  # what runs on an older build has not passed for these sources; after a new build everything runs again
  [[ $name == build && $outcome != passed ]] && key+=-older-build
  [[ $name == build ]] && rm -f "$out"/state/*
  echo "${outcome// /-} $key commit $commit, $((SECONDS - began)) s, $name.log" > "$out/state/$name"
done
table
exit $failed
