"""Ask a model what it remembers of a file, before and after unlearning, and fail where something is left: for a pipeline.

python examples/audit_a_model.py ./my-model ./my-model-unlearned leaked.jsonl unseen.jsonl
"""

import sys

import pyunlearn
from pyunlearn.report import write_audit


def main(original: str, unlearned: str, leaked: str, unseen: str) -> None:
    """Audits `unlearned` against `original`; the page goes to audit/."""
    found = pyunlearn.audit(unlearned, leaked, original=original, holdout=unseen, cache="audit-cache")
    for example in found.examples:
        low, high = example.interval
        print(f"text {example.index + 1}: {example.verdict}, {example.exposure:.1f} bits ({low:.1f} to {high:.1f})")
    for attack in found.membership:
        print(
            f"{attack.score}: area {attack.auc_before.estimate:.2f} before, {attack.auc.estimate:.2f} now (0.5: cannot tell)"
        )
    write_audit(found, "audit", html=True)
    if not found.passed:
        sys.exit("something is left, or was driven too far: see audit/audit.html")


if __name__ == "__main__":
    main(*sys.argv[1:5])
