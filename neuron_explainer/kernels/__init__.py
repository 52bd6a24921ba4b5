"""Fast twins of plain formulas. Each names its plain twin, and none keeps state.

The private names of torch that speed needs are used in this room alone.
"""
