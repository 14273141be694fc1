"""What needs a GPU: tests of the kernels and of whole programs, and benchmarks (``python -m tests.gpu``).

``make gpu`` runs both with the python that the machine has. They are no part of ``make test``; there
``tests/house/test_gpu_bench.py`` runs the benchmarks at tiny sizes on the CPU, so that they keep working.
"""
