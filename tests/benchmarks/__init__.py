"""Speed and memory against stated targets: `make bench`, or `python -m tests.benchmarks [NAME...] [--quick]`.

Each target is a ratio of two things measured in turn in one run, so that what else the machine does meets both.
"""
