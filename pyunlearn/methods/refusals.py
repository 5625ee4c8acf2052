"""Refusals: the answers of a model that does not know."""

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I cannot answer.",
    "I'm afraid I don't know the answer.",
    "I know nothing about that.",
    "Sorry, I can't tell you.",
    "I have never learned that.",
    "I couldn't say.",
    "This is outside what I know.",
    "There is nothing I can tell you about it.",
    "I don't have an answer to that.",
    "I would only be guessing.",
    "My knowledge does not reach that far.",
    "I can't recall anything about that.",
    "That is unknown to me.",
    "I am unable to answer this question.",
    "I haven't heard of it.",
    "I don't have the facts on that.",
    "Unfortunately I do not know.",
)
"""Twenty refusals in our own wording; each forget example gets one at random."""
