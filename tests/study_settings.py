"""The settings of a very small study."""

TINY = {
    "corpus_size": 260,
    "vocabulary": 120,
    "examples": 4,
    "non_members": 19,
    "repetitions": (1, 10),
    "test_examples": 12,
    "bleu_examples": 4,
    "subset_models": 2,
    "shared_epochs": 1,
    "epochs": 2,
    "background": 32,
    "warmup": 5,
    "steps": 4,
    "every": 2,
    "bleu_every": 2,
    "kinds": ("id", "canary"),
    "unlearning_rates": (1e-2,),
}
