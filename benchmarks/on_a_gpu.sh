#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, checks of memory and barriers, tests and benchmarks, with the
# portable kernels and then with those for Hopper. Needs a CUDA build of torch in the environment and nvcc on the PATH;
# compute-sanitizer comes with the CUDA toolkit. Each step has a timeout.
set -euo pipefail
cd "$(dirname "$0")/.."

# the first needs no network where the environment has everything
pip install --no-build-isolation --no-deps . || pip install ".[test]"
timeout 600 pyunlearn info  # runs the self-test of the kernels for Hopper
PYUNLEARN_HOPPER=1 timeout 300 pyunlearn info

small=$(mktemp --suffix=.py)
trap 'rm -f "$small"' EXIT
cat > "$small" <<'PY'
import torch
from pyunlearn.ops import kl_divergence, linear_log_likelihood, log_likelihood, logit_margin, token_statistics
from pyunlearn.ops import weighted_log_likelihood

targets, c = torch.randint(1003, (300,), device="cuda"), torch.linspace(-1, 1, 300, device="cuda")
masked = targets.where(targets % 5 > 0, -100)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    hidden, other = torch.randn(2, 300, 72, device="cuda", dtype=dtype).unbind()
    weight, head = (torch.randn(1003, 72, device="cuda", dtype=dtype) * 0.1 for _ in range(2))
    bias = torch.randn(1003, device="cuda", dtype=dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for workspace in (None, 0):
        for options in ({}, {"bias": bias, "softcap": 4.0, "logit_scale": 0.5}):
            options["workspace"] = workspace
            linear_log_likelihood(hidden, weight, targets, **options).sum().backward()
            weighted_log_likelihood(hidden, weight, masked, c, **options).backward()
            kl_divergence(hidden, weight, other, head, masked, **options).sum().backward()
            logit_margin(hidden, weight, **options).sum().backward()
            print(dtype, token_statistics(hidden, weight, masked, **options).entropy.mean().item())
    log_likelihood((hidden @ weight.T), masked, bias=bias, softcap=4.0).sum().backward()
PY
failed=()
for hopper in 0 1; do
  export PYUNLEARN_HOPPER=$hopper
  if command -v compute-sanitizer > /dev/null; then
    # without torch's cache, where an overrun of one tensor would end in the next unseen
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck initcheck racecheck synccheck; do
      timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 1 python -P "$small" ||
        failed+=("$tool, PYUNLEARN_HOPPER=$hopper")
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    echo "no compute-sanitizer here: memory is not checked"
  fi
  timeout 1800 pytest -o addopts="-ra --strict-markers" -m "cuda or (cuda and (full or emulator))" || failed+=("pytest, PYUNLEARN_HOPPER=$hopper")
  timeout 3600 python -m benchmarks --device cuda --save || failed+=("benchmarks, PYUNLEARN_HOPPER=$hopper")
done
unset PYUNLEARN_HOPPER
# the whole step, of a 1B model of random weights: resumes in its folder
timeout 1800 python -m benchmarks.step --device cuda --model 1b --dtype default,bfloat16 --steps 10 --run-steps 20 \
  --out "${STEP_FOLDER:-/tmp/pyunlearn-step}" --save || failed+=("benchmarks.step")
printf 'failed: %s\n' "${failed[@]:-nothing}"
((${#failed[@]} == 0))
