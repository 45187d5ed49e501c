"""What inference does unless it is told otherwise, in one place for all functions that take it."""

NUM_SAMPLES = 256
CHAINS = 8
"""Of Metropolis–Hastings."""
TAIL_SHARE = 0.5
ESS_THRESHOLD = 0.5
EVERY = 5
"""Tokens of a string between two looks of SMC at the weights."""
REJECTIONS = 32
"""Tokens that SMC draws anew at one place."""
