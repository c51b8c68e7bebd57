"""FlashMem: latent memory for a frozen causal language model.

    from transformers import GenerationConfig
    from flashmem import Backbone, TriggerConfig, generate, load_memory

    backbone = Backbone.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct", device="cuda", dtype="bfloat16")
    memory = load_memory("path/to/checkpoint", backbone)
    prompt = backbone.encode_chat("A farm has 3 barns with 14 hens each. How many hens?")
    trigger, config = TriggerConfig(threshold=2.1), GenerationConfig(max_new_tokens=256)
    (answer,) = generate(backbone, [prompt], memory=memory, trigger=trigger, generation_config=config)
    print(answer.text, [(t.text_index, t.entropy) for t in answer.triggers])

Names are loaded when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Backbone": "backbone",
    "DecodeState": "backbone",
    "MonitorConfig": "monitor",
    "TriggerConfig": "trigger",
    "MemoryConfig": "memory",
    "MemorySource": "memory",
    "SampleContext": "memory",
    "new_memory": "memory",
    "load_memory": "memory",
    "MemoryBank": "placebo",
    "RandomMemory": "placebo",
    "ShuffledMemory": "placebo",
    "MeanMemory": "placebo",
    "NoopMemory": "placebo",
    "Clock": "generation",
    "Generation": "generation",
    "Trigger": "generation",
    "generate": "generation",
    "Scores": "scoring",
    "score": "scoring",
    "Session": "session",
    "TraceRecorder": "trace",
    "Threshold": "calibration",
    "calibrate": "calibration",
    "Example": "training",
    "TrainConfig": "training",
    "train_memory": "training",
    "FlashMemError": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "UnsupportedBackboneError": "errors",
    "PromptTooLongError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashmem' has no attribute {name!r}")
    return getattr(import_module(f"flashmem.{_HOMES[name]}"), name)
