"""`python -m benchmarks.gpu`: the benchmarks of operators and layers on a CUDA device.

They are those of the CPU, with tensors on the device and times between its events; a benchmark that
has more to say about a GPU is a module here, with the same `run(session)`.
"""
