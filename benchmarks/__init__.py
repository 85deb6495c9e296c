"""`python -m benchmarks`: lowrank beside its installed peers, at the level of operator, layer and
training step.
"""
