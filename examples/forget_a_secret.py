"""Remove leaked keys from a model, and check the result in code.

python examples/forget_a_secret.py ./my-model leaked.jsonl ordinary.jsonl fresh.jsonl
"""

import sys

import pyunlearn
from pyunlearn.report import utility_line


def main(model: str, leaked: str, ordinary: str, fresh: str) -> None:
    """Forget the texts in `leaked`, keep those in `ordinary`, and save the model next to the original.

    `fresh` holds 19 or more keys of the same format that were drawn just now: how likely is one that never leaked?
    """
    result = pyunlearn.unlearn(model, leaked, retain=ordinary, holdout=fresh, utility_budget=0.02)
    for example in result.examples:
        print(f"{example.verdict:15} exposure {example.exposure_before:.1f} -> {example.exposure_after:.1f} bits")
    print(utility_line(result))
    if not result.forgotten:
        sys.exit(f"still exposed ({result.stopped}): allow a larger utility_budget, or give more retain texts")
    print("saved to", result.save(f"{model.rstrip('/')}-unlearned"))


if __name__ == "__main__":
    main(*sys.argv[1:5])
