"""Collectives as data: each algorithm is a pure generator of steps that knows nothing of MPI.

A schedule says what one rank sends, receives and reduces, in order. Executors run it (`comm/`), `check.py` proves it
for every rank count and length without any network, and the closed forms beside each algorithm price it.
"""
