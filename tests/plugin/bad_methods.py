"""A plugin as users write them, with a method that does what no method should: which sample meets what is in a file.

`tests.faulty.install` puts it beside a list of entry points and a `faults.json`, so that worker processes find it as
they find any plugin.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from flashmem_bench.methods.base import MethodSpec
from flashmem_bench.methods.latent import LatentMethod

HERE = Path(__file__).parent
_STEP = 64 * 2**20


class Faulty(LatentMethod):
    """Answers like `vanilla`, but for the samples that meet a fault."""

    def generate(self, prompts, samples, clock, seed, **more):
        for sample in samples:
            fault = json.loads((HERE / "faults.json").read_text()).get(sample.sample_id)
            if fault is not None:
                meet(fault, sample.sample_id)
        return super().generate(prompts, samples, clock, seed, **more)

    # Samples that are answered together come through `generate` as well.
    stream = None

    def warm_up(self, prompt, sample):
        """Nothing: faults are met by the sample that is recorded."""


def meet(fault: str, sample_id: str) -> None:
    """Do what a fault says."""
    if fault == "raises":
        raise ValueError("this sample is not well")
    if fault == "hangs":
        while True:
            time.sleep(1)
    if fault == "grows":
        kept = []
        while True:
            kept.append(b"x" * _STEP)
            time.sleep(0.01)
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "dies once":
        mark = HERE / f"{sample_id}.died"
        if not mark.exists():
            mark.touch()
            os._exit(7)
    if fault == "waits":
        (HERE / f"{sample_id}.waits").touch()
        while not (HERE / "go").exists():
            time.sleep(0.01)


def build(context):
    return Faulty(context, memory=None, trigger_for=lambda sample: None)


SPEC = MethodSpec(name="faulty", summary="meets faults", build=build)
