#!/usr/bin/env bash
# Everything that wants a card, in one call: build, checks of memory and barriers, tests and benchmarks, with the portable kernels and then with those for Hopper.
# Wants a CUDA build of torch in the environment and nvcc on the PATH; compute-sanitizer comes with the CUDA toolkit. What hangs is stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

pip install --no-build-isolation --no-deps . || pip install ".[test]"  # the first needs no network where the environment has everything
timeout 600 pyunlearn info  # with the trial of the kernels for Hopper
PYUNLEARN_HOPPER=1 timeout 300 pyunlearn info

small=$(mktemp --suffix=.py)
trap 'rm -f "$small"' EXIT
cat > "$small" <<'PY'
import torch
from pyunlearn.ops import linear_log_likelihood, token_statistics

hidden = torch.randn(300, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(1003, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(1003, (300,), device="cuda")
for workspace in (None, 0):
    linear_log_likelihood(hidden, weight, targets, workspace=workspace).sum().backward()
print(token_statistics(hidden, weight, targets).entropy.mean())
PY
failed=()
for hopper in 0 1; do
  export PYUNLEARN_HOPPER=$hopper
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck initcheck racecheck synccheck; do  # without torch's cache, where one tensor would end in the next unseen
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 1 python -P "$small" ||
        failed+=("$tool, PYUNLEARN_HOPPER=$hopper")
    done
  else
    echo "no compute-sanitizer here: memory is not checked"
  fi
  timeout 1800 pytest -o addopts="-ra --strict-markers" -m cuda || failed+=("pytest, PYUNLEARN_HOPPER=$hopper")
  timeout 3600 python -m benchmarks --device cuda --save || failed+=("benchmarks, PYUNLEARN_HOPPER=$hopper")
done
printf 'failed: %s\n' "${failed[@]:-nothing}"
((${#failed[@]} == 0))
