"""AutoRound: rounding and clipping learnt by signed gradients, block by block, groups along the inputs.

Its default of 200 iterations on 128 sequences of 2,048 tokens is made for GPUs; here it gets what a laptop has time for. It
leaves the embedding and the tied head alone; where they are to be small, they are rounded plainly in the same groups.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from benchmarks.quality.peers import by_matrix, packed, rounding

TITLE, ENVIRONMENT = "AutoRound", "autoround"
_BITS = [(4, 64, 4), (3, 64, 4), (2, 64, 4), (2, 32, 3)]
SETTINGS = {"smollm2": [{"bits": b, "group": g, "embedding": e, "iters": 50} for b, g, e in _BITS]}


def compress(model: Any, settings: dict[str, Any], data: Any) -> int:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    bits, group, embedding = settings["bits"], settings["group"], settings["embedding"]
    windows = [{"input_ids": w[None]} for batch in data.calibration for w in batch["input_ids"]]
    tool = AutoRound(
        model, AutoTokenizer.from_pretrained(str(data.folder), trust_remote_code=False), bits=bits, group_size=group, sym=False,
        dataset=DataLoader(windows, batch_size=None), iters=settings["iters"], nsamples=len(windows),
        seqlen=windows[0]["input_ids"].shape[1], batch_size=4, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    found, _ = tool.quantize()
    for path, parameter in found.named_parameters():  # the model may have been taken apart: bring its weights home
        if found is not model and path in dict(model.named_parameters()):
            model.get_parameter(path).data.copy_(parameter.data)
    sizes = lambda w: (w, packed(w.numel(), bits) + w.numel() // group * 2 + packed(w.numel() // group, bits))  # noqa: E731
    return by_matrix(model, sizes, rounding(embedding, group) if embedding < 16 else None)
