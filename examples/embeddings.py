"""Sentence vectors from a real encoder, and which sentences are about the same thing."""
# needs: minilm

import deepseek

TEXTS = [
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "Interest rates rose by half a percent.",
]

encoder = deepseek.load("all-minilm-l6-v2")
vectors = encoder.embed(TEXTS)
likeness = vectors @ vectors.T
print(likeness)
assert likeness[0, 1] > likeness[0, 2]
