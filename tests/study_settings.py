"""The settings of a very small study."""

TINY = {
    "corpus_size": 150,
    "vocabulary": 120,
    "examples": 2,
    "doses": (1, 8),
    "seeds": 3,
    "non_members": 19,
    "test_examples": 12,
    "epochs": 2,
    "warmup": 2,
    "steps": 4,
    "kinds": ("id", "canary"),
    "unlearning_rates": (1e-2,),
}
