"""Wrong arguments of the metrics: one sentence that names the argument, no error of numpy's and no silent number."""

import numpy as np
import pytest
import torch

from pyunlearn import metrics
from pyunlearn.errors import ArgumentError

ONE, FEW, ROWS = [-1.0, -2.0], np.linspace(1.0, 2.0, 40), np.eye(3)
CALLS = {
    "answer_prior": (ONE, ONE),
    "auc": (ONE, FEW),
    "audit_within": (lambda indices: [0.0] * len(indices), ROWS, 2),
    "bootstrap_interval": (FEW,),
    "calibrated_scores": (ONE, ONE),
    "collapsed": ([1, 2],),
    "counterfactual_memorization": ([[1, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]),
    "discoveries": (FEW,),
    "distinct_n": ([1, 2],),
    "exact_memorization": ([True, False],),
    "exposure": (ONE, FEW),
    "exposure_interval": (ONE, FEW),
    "exposure_null_test": ([1.0, 0.0], 1),
    "exposure_top_test": ([1.0, 0.0], 1),
    "exposure_two_sample_test": ([1.0, 0.0], [1.0, 0.0]),
    "extraction_probability": (ONE, 10),
    "extraction_strength": ([True, False],),
    "forget_quality": (FEW, FEW),
    "generalized_exposure": (ONE, FEW),
    "insert_canaries": (["a"], ["b"], 2),
    "knn_radius": (np.eye(12), np.eye(12)),
    "ksd_difficulty": (ROWS, ROWS, ROWS, ROWS),
    "lira_score": (ONE, [[1.0, 2.0]] * 2),
    "logit_score": (ONE,),
    "loss_score": (ONE,),
    "mean_exposure_interval": ([1.0, 0.0], 1),
    "mean_interval": (FEW,),
    "median_steps": ([1.0, 2.0], [True, False]),
    "min_k_plus_plus_score": ([ONE], [ONE], [[1.0, 1.0]]),
    "min_k_score": ([ONE],),
    "non_member_drift": (ONE, ONE),
    "option_probability": (ONE, [ONE] * 2),
    "out_of_distribution": (ONE, FEW),
    "paired_difference": (ONE, ONE),
    "perplexity": (ONE, [1, 2]),
    "privleak_interval": (ONE, FEW),
    "recovery": ([ONE], [FEW]),
    "reference_score": (ONE, ONE),
    "repetition": ([1, 2],),
    "rouge_l": (["a"], ["a"]),
    "steps_to_forget": (ROWS, 1.0),
    "tpr_at_fpr": (ONE, FEW),
    "truth_ratio": (ONE, [ONE] * 2),
    "verbatim_match": ([1, 2], [1, 2]),
    "verdict": (ONE, ONE, FEW),
    "zlib_score": (ONE, ["a", "b"]),
}
WRONG = {
    "a word": "many",
    "words": ["a", "b"],
    "nothing": None,
    "rows of two lengths": [[1.0], [1.0, 2.0]],
    "three dimensions": np.zeros((2, 2, 2)),
    "a tensor with a gradient": torch.ones(2, requires_grad=True),
    "numbers beyond floats": [10**400, 1],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_one_sentence(name):
    """Each array or list of each function in turn is something else: a result, or a sentence of ours."""
    function, arguments = getattr(metrics, name), CALLS[name]
    if name == "rouge_l":
        pytest.importorskip("rouge_score")
    for i, own in enumerate(arguments):
        for kind, value in WRONG.items() if isinstance(own, list | np.ndarray) else ():
            sentence = "a result"
            try:
                function(*arguments[:i], value, *arguments[i + 1 :])
            except ArgumentError as error:
                sentence = str(error)
            except Exception as error:
                pytest.fail(f"{name}, argument {i + 1} is {kind}: {error!r}")
            assert "\n" not in sentence


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.generalized_exposure([[1.0, 2.0]], FEW), r"scores of shape \(n,\) .* got \(1, 2\)"),
        (lambda: metrics.verdict(ONE, ONE, FEW, recited=[True]), "recited must have one entry for each of the 2 texts"),
        (lambda: metrics.verdict(ONE, ONE, FEW, too_low=[True]), "too_low must have one entry"),
        (lambda: metrics.verdict(ONE, ONE, FEW, families=[0]), "families must have one entry"),
        (lambda: metrics.verdict(ONE, ONE, FEW, standing_out=[0, 0, 0]), "standing_out must have one entry"),
        (
            lambda: metrics.verdict(ONE, ONE, FEW, extracted=[0.5], non_member_extracted=FEW),
            "extracted must have one entry",
        ),
        (lambda: metrics.rouge_l("the code", "the code"), "written must be a list of texts, got one string"),
        (lambda: metrics.bleu(["a b"], "a"), "truth must be a list of texts, or of lists"),
        (
            lambda: metrics.mean_interval(FEW, draws=2.5, bounds=(0, 9)),
            "draws must be a whole number, 1 or more, got 2.5",
        ),
    ],
)
def test_what_would_be_a_number_of_something_else_is_refused(call, message):
    """Rows that would be flattened, one flag for all texts, the characters of a text."""
    with pytest.raises(ArgumentError, match=message):
        call()


def test_numbers_of_numpy_and_flags_are_accepted():
    """Counts of numpy's types, shares as flags, a false-positive rate that leaves no text above it."""
    assert sorted(metrics.insert_canaries(["a"], ["b"], np.int64(2)).texts) == ["a", "b", "b"]
    flags = {"extracted": [True, False], "non_member_extracted": [False] * 40}
    assert metrics.verdict([0.0, 0.0], [1.5, 1.5], FEW, **flags).verdict.tolist() == ["still exposed", "forgotten"]
    assert metrics.tpr_at_fpr(ONE, range(1000), 1 - 1e-13).threshold == 999
