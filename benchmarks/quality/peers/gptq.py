"""GPTQ by llm-compressor: error feedback under the inputs' second moments, groups along the inputs, static activation order.

It leaves the embedding and the tied head alone; where they are to be small, they are rounded plainly in the same groups.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.quality.peers import by_matrix, packed, rounding

TITLE, ENVIRONMENT = "GPTQ (llm-compressor)", "llmcompressor"
_BITS = [(4, 64, 4), (3, 64, 4), (2, 64, 4)]
SETTINGS = {
    "smollm2": [{"bits": b, "group": g, "embedding": e} for b, g, e in _BITS],
    "smollm2-as-shipped": [{"bits": 4, "group": 32, "embedding": 8}],
}


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    bits, group, embedding = settings["bits"], settings["group"], settings["embedding"]
    windows = [w.tolist() for batch in data.calibration for w in batch["input_ids"]]
    scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]}),
        recipe=GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": scheme}}, ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    sizes = lambda w: (w, packed(w.numel(), bits) + w.numel() // group * 2 + packed(w.numel() // group, bits))  # noqa: E731
    for module in model.modules():  # its scales and zero points are counted with the codes above
        for name in [n for n in module._parameters if n.startswith(("weight_", "input_", "output_"))]:
            del module._parameters[name]
    return by_matrix(model, sizes, rounding(embedding, group) if embedding < 16 else None)
