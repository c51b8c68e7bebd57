"""Grading: text in, scores out; pure Python that knows neither torch nor lm-eval.

`extract` finds the answer in a completion, `match` compares it with the right one, `hooks` lets suite files
name both.
"""
