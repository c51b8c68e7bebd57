"""The engine against the hardware and against transformers' `generate`: what `flashmem-bench engine` measures.

    setting     the model, the device and the limits of one command
    workload    the prompts, and how answers end
    contestants who answers them: our engine, and `generate` on a model of its own
    gates       are the answers right? Without that no figure is given
    turns       contestants in turns, ratios run by run
    figures     a ratio, the bound that it is held against, and the verdict
    checks      the checks by name
    answering, decoding, stepping, memory, profile    the checks themselves
    files       the document of a command and the table of all
    table       the same on a terminal

Needs torch, transformers, numpy and scipy; neither lm-eval, datasets nor pydantic.
"""
