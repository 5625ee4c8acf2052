"""Audit a model before and after unlearning, in a pipeline: exit code 1 where a text is still exposed.

python examples/audit_a_model.py ./my-model ./my-model-unlearned leaked.jsonl unseen.jsonl
"""

import sys

import pyunlearn
from pyunlearn.report import write_audit


def main(original: str, unlearned: str, leaked: str, unseen: str) -> None:
    """Audit `unlearned` against `original`, and write audit.json and audit.html to the folder audit."""
    audit = pyunlearn.audit(unlearned, leaked, original=original, holdout=unseen, cache="audit-cache")
    for example in audit.examples:
        low, high = example.interval
        print(f"text {example.index + 1}: {example.verdict}, {example.exposure:.1f} bits ({low:.1f} to {high:.1f})")
    for attack in audit.membership:
        if attack.auc_before is None or attack.auc is None:  # both are there with a holdout and an original
            continue
        before, now = attack.auc_before.estimate, attack.auc.estimate
        print(f"{attack.score}: AUC {before:.2f} before, {now:.2f} now (0.5: members are not told apart)")
    write_audit(audit, "audit", html=True)
    if not audit.passed:
        sys.exit("a text is still exposed, or over-unlearned: see audit/audit.html")


if __name__ == "__main__":
    main(*sys.argv[1:5])
