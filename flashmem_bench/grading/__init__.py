"""Grading: text in, scores out; pure Python that knows neither torch nor lm-eval.

`extract` and `choice` find the answer in a completion, `match`, `maths` and `rouge` compare it with the right one,
`hooks` lets suite files name them. `worker` runs a grader that may hang in a process with a deadline, and `outcome`
says what a grade is that did not come.
"""
