"""Trains the built-in demo model and its drafter; run it through `bin/train-demo`. Never imported at run
time.
"""
