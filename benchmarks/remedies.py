"""What is done to a weight before it is coded, and what that is worth: SmolLM2-135M, fitted to its weights alone.

    python benchmarks/remedies.py TEXT [--bits 4 3] [--dim 4 --stages 2] [--only rotation …]

Each remedy changes every matrix, lets the library encode the changed one as its plan says, and undoes the change; what it would have
to store is counted. `more bits` spends a remedy's bytes on a higher average rate instead (`--bits 4.25`): what a remedy must beat.
Perplexity over the first 12 windows of 512 tokens of TEXT. docs/remedies.md holds what it printed at 4 bits.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

from real_models import perplexity, smollm2
from torch import Tensor

import rpq_convert as rpq
from rpq_convert.encoding.encode import build, encode
from rpq_convert.layers import surgery

GROUP, KEPT = 64, 0.005  # inputs of a rotation or a scale; share of weights kept apart


def coded(job, weight: Tensor) -> Tensor:
    """Return a weight after it was encoded and decoded."""
    result = encode(replace(job, dtype="float32"), weight)
    return build(job, result.tensors, result.zero_row)().detach()


def plain(job, weight: Tensor, norm: Tensor | None) -> tuple[Tensor, float]:
    return coded(job, weight), 0


def rotation(job, weight: Tensor, norm: Tensor | None) -> tuple[Tensor, float]:
    """The library's block-Hadamard transform of the inputs: outliers are spread over their block."""
    return coded(replace(job, spec=replace(job.spec, rotation=GROUP)), weight), 0


def outliers(job, weight: Tensor, norm: Tensor | None) -> tuple[Tensor, float]:
    """The largest weights of every row are kept as they are: an index and 16 bits each."""
    count = round(KEPT * weight.shape[1])
    return coded(replace(job, spec=replace(job.spec, outliers=count)), weight), 4 * count * len(weight)


def groups(job, weight: Tensor, norm: Tensor | None) -> tuple[Tensor, float]:
    """A scale for every 64 inputs of a row, not only for every row."""
    parts = weight.view(len(weight), -1, GROUP)
    scale = parts.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8).half().float()
    return (coded(job, (parts / scale).view_as(weight)).view_as(parts) * scale).view_as(weight), 2 * scale.numel()


def norms(job, weight: Tensor, norm: Tensor | None) -> tuple[Tensor, float]:
    """Inputs that come out of a norm are scaled by its weight, so errors count as that says; the norm is stored anyway."""
    if norm is None:
        return plain(job, weight, norm)
    size = norm.abs().clamp_min(norm.abs().mean() * 1e-3)
    return coded(job, weight * size) / size, 0


REMEDIES = {f.__name__: f for f in (plain, rotation, outliers, groups, norms)}


def norm_before(model, name: str) -> Tensor | None:
    """Return the weight of the norm whose output this weight multiplies, in a Llama."""
    block, _, part = name.partition(".self_attn.") if ".self_attn." in name else name.partition(".mlp.")
    if part.startswith(("q_", "k_", "v_")):
        return model.get_parameter(f"{block}.input_layernorm.weight").data
    if part.startswith(("gate", "up")):
        return model.get_parameter(f"{block}.post_attention_layernorm.weight").data
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--bits", type=float, nargs="*", default=[4, 3])
    parser.add_argument("--dim", type=int, help="with --stages, in the place of --bits: summed codewords")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[*REMEDIES, "more bits"])
    asked = parser.parse_args()
    base, tokenizer = smollm2()
    text = Path(asked.text).read_text("utf8")
    before = perplexity(base, tokenizer, text)
    print(f"dense: {before:.3f}\n\n| bits | remedy | MB | perplexity | / base |\n|---|---|---|---|---|", flush=True)
    sizes = [{"bits": b} for b in asked.bits] if asked.dim is None else [{"dim": asked.dim, "stages": asked.stages}]
    for size in sizes:
        plan, bits = rpq.plan(base, **size), size.get("bits", 8 * asked.stages / (asked.dim or 8))
        for name in asked.only:
            model, extra = copy.deepcopy(base), 0.0
            if name == "more bits":
                plan_more = rpq.plan(base, target_size=plan.file_bytes + 2 * 134_479_872 // GROUP, sensitivity="shape")
                rpq.convert(model, plan=plan_more)
                rpq.restore(model)
                size = plan_more.file_bytes
            else:
                for job in plan.jobs:
                    module, key = surgery.find(model, job.name)
                    found, more = REMEDIES[name](job, getattr(module, key).data, norm_before(model, job.name))
                    getattr(module, key).data.copy_(found)
                    extra += more
                size = plan.file_bytes + extra
            found = perplexity(model, tokenizer, text)
            print(f"| {bits:g} | {name} | {size / 1e6:.1f} | {found:.3f} | {found / before:.3f} |", flush=True)


if __name__ == "__main__":
    main()
