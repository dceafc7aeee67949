"""Does arithmetic on numbers of 8 bits, finds zeros in weights, counts values, and names
precisions.

May import: `base`, `schedules`.
"""
