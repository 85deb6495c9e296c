"""`python -m benchmarks.gpu`: the operators on a CUDA device, a file for each.

A benchmark is a module here with `run(session)`, and a line in `cli.BENCHMARKS`. It forms the
contenders of a case and hands them to `session.compare`, which times them and keeps the rows.
"""
