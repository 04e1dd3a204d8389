"""Planner: decides for every slot whether and how it is converted. Pure: reads names, shapes and types alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rpq_convert.core.axes import WeightView
from rpq_convert.core.rotation import fitting
from rpq_convert.core.safetensors import parse_size
from rpq_convert.core.spec import Spec, dtype_name, dtype_of
from rpq_convert.errors import PlanError
from rpq_convert.planning.plan import DEFAULT_SHARD, Job, Plan, Skip
from rpq_convert.planning.rules import Rule, as_rule, load_preset, overlay, settings_for, split_bits
from rpq_convert.planning.slots import Slot

DEFAULT_PRESET = "5bit"  # the smallest within 10 % of SmolLM2-135M: docs/default-preset.md


def job_seed(seed: int, name: str) -> int:
    """Return a seed per parameter, so that results depend on no order of execution."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


def make_plan(
    slots: Sequence[Slot],
    *,
    preset: str | None = None,
    bits: float | None = None,
    dim: int | None = None,
    stages: int | None = None,
    codebooks: str | int | None = None,
    axis: str | None = None,
    rules: Iterable[Rule | Mapping[str, Any]] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rotation: int | None = None,
    outliers: float | None = None,
    fit: str | None = None,
    seed: int = 0,
    grow: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD,
    head_rules: Sequence[Rule] | None = None,
    warnings: Sequence[str] = (),
) -> Plan:
    """Decide for every slot. Pure: reads names, shapes and types alone.

    Args:
        slots: the model, from `walk` or `walk_headers`.
        preset: a preset's name or TOML path; with no size option at all, `DEFAULT_PRESET`.
        bits, dim: code bits per weight (8 where an output has at most 32 inputs), or the length of a sub-vector.
        stages: with `dim`, how many codewords are summed for one sub-vector.
        codebooks: `"heads"`, the seed's rule, or a number: that many codebooks per parameter, one for each block.
        axis: the cut axis for layers that allow both.
        rotation: size of a block-Hadamard rotation of the inputs, 0 for none; by default what the preset says.
        outliers: share of each output's weights, the largest, that is kept apart in 32 bits each.
        rules: overlay the preset, first match wins; one that matches nothing is an error.
        include, exclude: patterns as in rules; only what is included and not excluded is converted.
        fit: `kmeans`, `additive` or `random`, for everything.
        grow: convert layers that would grow as well.
        dtype: dtype of what stays dense, and of expanded weights; as stored by default.
        head_rules: the rules that `codebooks="heads"` means for this model.

    Raises:
        PlanError: unknown preset or setting, conflicting sizes, a rule that matched nothing, a length that the number
            of codebooks does not divide.
    """
    if sum(x is not None for x in (preset, bits, codebooks)) > 1:
        raise PlanError("give one of preset, bits and codebooks, not several")
    own = [as_rule(r) for r in rules]
    only, never = [Rule(p) for p in include], [Rule(p) for p in exclude]
    base: dict[str, Any]
    preset_rules: Sequence[Rule] = ()
    if codebooks == "heads":
        if head_rules is None:
            raise PlanError(
                "codebooks='heads' needs a model with attention heads; use bits, dim or a number of codebooks"
            )
        base, preset_rules = {"books": "blocks", "codebook_dtype": "float32", "scales": "none"}, head_rules
    elif codebooks is not None:
        try:
            count = int(codebooks)
        except ValueError:
            raise PlanError(f"codebooks must be 'heads' or a number, not {codebooks!r}") from None
        base = {"num_codebooks": count, "codebook_dtype": "float32", "scales": "none"}
    else:
        name = preset or (None if bits is not None or dim is not None else DEFAULT_PRESET)
        chosen = load_preset(name) if name else None
        base = dict(chosen.settings) if chosen else {"books": 1, "codebook_dtype": "float16", "scales": "float16"}
        preset_rules = chosen.rules if chosen else ()
        if bits is not None:
            base = overlay(base, {"bits": bits})
    if stages is not None and dim is None:
        raise PlanError("stages needs dim: together they are the bits per weight")
    if dim is not None:
        size = {"dim": dim} if stages is None else {"dim": dim, "stages": stages}
        base = overlay(base, size)
        preset_rules = [Rule(r.match, overlay(r.settings, size)) for r in preset_rules]
    asked = {"axis": axis, "rotation": rotation, "outliers": outliers, "fit": fit, "grow": grow or None}
    forced = {k: v for k, v in asked.items() if v is not None}

    hits: dict[int, int] = {}
    jobs: list[Job] = []
    skips: list[Skip] = []
    floating = dtype_of(dtype) if dtype else None
    for slot in slots:
        for r in (*own, *only, *never):
            hits[id(r)] = hits.get(id(r), 0) + (not slot.buffer and r.matches(slot))
        stored = floating if floating is not None and slot.dtype.is_floating_point else slot.dtype
        decision = _decide(slot, stored, base, own, preset_rules, only, never, forced, seed)
        if isinstance(decision, Job):
            jobs.append(decision)
        else:
            skips.append(
                Skip(slot.name, slot.aliases, slot.layer, slot.shape, dtype_name(stored), decision, slot.buffer)
            )
    unmatched = [r.match for r in (*own, *only, *never) if not hits.get(id(r))]
    if unmatched:
        some = ", ".join(s.name for s in slots[:3])
        raise PlanError(f"no parameter matches {', '.join(map(repr, unmatched))}; names look like {some}")
    options = {
        "preset": preset, "bits": bits, "dim": dim, "codebooks": codebooks, "axis": axis, "fit": fit, "seed": seed,
        **{k: v for k, v in (("stages", stages), ("rotation", rotation), ("outliers", outliers)) if v is not None},
        "grow": grow, "dtype": dtype, "include": list(include), "exclude": list(exclude),
        "rules": [{"match": r.match, **r.settings} for r in own],
    }  # fmt: skip
    if all(options[k] is None for k in ("preset", "bits", "dim", "codebooks")):
        options["preset"] = DEFAULT_PRESET
    plan = Plan(tuple(jobs), tuple(skips), options, parse_size(max_shard_size), tuple(warnings))
    return Plan(plan.jobs, plan.skips, options, plan.max_shard_size, (*warnings, *warnings_of(plan)))


# Where an output has no more inputs than this (depthwise kernels, the convolution of a picture's pixels), `bits` means 8 of them:
# errors have nothing to average out over, and the bytes are few. EfficientNet-Lite0 at 4 bits: 12 % of its answers stay the
# dense model's without, 38 % with it, in 3 % more bytes.
FEW = 32


def _decide(
    slot: Slot,
    stored: torch.dtype,
    base: Mapping[str, Any],
    rules: Sequence[Rule],
    preset_rules: Sequence[Rule],
    only: Sequence[Rule],
    never: Sequence[Rule],
    forced: Mapping[str, Any],
    seed: int,
) -> Job | str:
    """Return the slot's job, or the reason why it stays dense."""
    settings, rule = settings_for(slot, base, preset_rules)
    by = f"preset rule {rule.match!r}" if rule else "the settings for everything"
    own = next((r for r in rules if r.matches(slot)), None)
    if own is not None:
        settings, by = overlay(settings, own.settings), f"rule {own.match!r}"
        if any(k in own.settings for k in ("bits", "dim", "num_codebooks")) and "skip" not in own.settings:
            settings.pop("skip", None)
    if slot.reason:
        return slot.reason
    if next((r for r in never if r.matches(slot)), None):
        return "excluded"
    if only and not any(r.matches(slot) for r in only):
        return "not included"
    if settings.get("skip"):
        return f"skipped by {by}"
    try:
        view = WeightView(settings["view"]) if "view" in settings else slot.view
        if view is None:
            return f"raw parameter of {slot.layer}: no known axes; a rule with a view of {len(slot.shape)} converts it"
        view.check(slot.shape)
    except (ValueError, AttributeError) as e:
        raise PlanError(f"{slot.name}: {e}") from None
    settings = overlay(
        settings, {k: v for k, v in forced.items() if k != "axis" or slot.view is None or view.axis == "out"}
    )
    if 0 in slot.shape:
        return "empty"
    spec = resolve(slot.name, slot.shape, view, settings)
    few = view.axis == "out" and view.matrix_shape(slot.shape, "in")[1] <= FEW
    if few and "bits" in settings and spec.bits < 8 and not (own and "bits" in own.settings):
        spec = resolve(slot.name, slot.shape, view, overlay(settings, {"bits": 8}))
        by += f", and 8 bits for at most {FEW} inputs"
    fit = settings.get("fit") or ("additive" if spec.stages > 1 else "kmeans")
    if fit not in ("kmeans", "additive", "random"):
        raise PlanError(f"{slot.name}: fit must be kmeans, additive or random, not {fit!r}")
    if fit == "kmeans" and spec.stages > 1:
        fit = "additive"
    if fit == "random":  # no weight is larger than the others
        spec = replace(spec, outliers=0)
    job = Job(
        name=slot.name, aliases=slot.aliases, layer=slot.layer, shape=slot.shape, dtype=dtype_name(stored),
        view=view.names, spec=spec, fit=fit, seed=job_seed(seed, slot.name), rule=by, padding_idx=slot.padding_idx,
    )  # fmt: skip
    size = sum(job.nbytes.values())
    if size >= job.dense_bytes and not settings.get("grow"):
        return f"would grow from {job.dense_bytes:,} to {size:,} bytes"
    return job


def resolve(name: str, shape: tuple[int, ...], view: WeightView, settings: Mapping[str, Any]) -> Spec:
    """Turn settings into the spec of one parameter."""
    try:
        books: Any = settings.get("books", 1)
        stages = settings.get("stages", 1)
        dim: Any
        by_bits = "num_codebooks" not in settings and "dim" not in settings and "bits" in settings
        if by_bits:
            dim, stages = split_bits(settings["bits"])
        else:
            dim = settings.get("dim")
        # Short sub-vectors of one codebook lose nothing along the inputs (measured: docs/architecture.md), where lookups
        # are up to 2.5 times as fast.
        short = "num_codebooks" not in settings and dim in (1, 2) and stages == 1 and books == 1
        axis = settings.get("axis") or ("in" if short else view.axis)
        length = view.matrix_shape(shape, axis)[1]
        if "num_codebooks" in settings:
            count = settings["num_codebooks"]
            if not isinstance(count, int) or count < 1:
                raise PlanError(f"num_codebooks must be a whole number of at least 1, not {count!r}")
            if length % count:
                near = sorted((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - count))[:3]
                raise PlanError(
                    f"{count} codebooks do not divide its length of {length}; try {', '.join(map(str, near))}"
                )
            dim, books = length // count, count
        elif dim is None:
            raise PlanError("no size is set; give bits, dim or num_codebooks")
        if books != "blocks" and (not isinstance(books, int) or isinstance(books, bool)):
            raise PlanError(f"books must be 'blocks' or a whole number, not {books!r}")
        blocks = math.ceil(length / dim) if isinstance(dim, int) and dim > 0 else 1
        scales, rotation = settings.get("scales", "none"), settings.get("rotation", 0)
        if not isinstance(rotation, int) or isinstance(rotation, bool) or rotation < 0:
            raise PlanError(f"rotation must be a whole number, 0 for none, not {rotation!r}")
        share, inputs = settings.get("outliers", 0), view.matrix_shape(shape, "in")[1]
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 0.1:
            raise PlanError(f"outliers must be a share of the weights from 0 to 0.1, not {share!r}")
        spec = Spec(
            dim=dim,
            books=blocks if books == "blocks" else min(books, blocks),
            stages=stages,
            axis=axis,
            codebook_dtype=settings.get("codebook_dtype", "float16"),
            scales=None if scales == "none" else scales,
            layout="rows" if view.axis == "in" and axis == "in" else "blocks",
            rotation=fitting(rotation, inputs),
            outliers=0 if "expert" in view.axes else round(share * inputs),
        )
        if (
            by_bits and stages > 1
        ):  # codebooks of a small parameter outweigh its codes: one stage may be more bits in fewer bytes
            one = resolve(name, shape, view, overlay(settings, {"dim": int(8 // settings["bits"])}))
            if sum(one.nbytes(view, shape).values()) <= sum(spec.nbytes(view, shape).values()):
                return one
        return spec
    except PlanError as e:
        raise PlanError(f"{name} {list(shape)}: {e}") from None
    except (ValueError, TypeError, KeyError) as e:
        raise PlanError(f"{name} {list(shape)}: {e}") from None


def warnings_of(plan: Plan) -> list[str]:
    """Say plainly where most of the weights' information will go."""
    fitted = [j for j in plan.jobs if j.fit != "random"]
    weights = sum(math.prod(j.shape) for j in fitted)
    if not weights:
        return []
    error = sum(math.prod(j.shape) * j.expected_error for j in fitted) / weights
    bits = sum(math.prod(j.shape) * j.spec.bits for j in fitted) / weights
    if error < 0.3:
        return []
    return [
        f"{bits:.2g} code bits per weight keep little of pretrained weights (expected relative squared error {error:.2f} "
        f"of 1): this size suits random codebooks and training (--fit random). To keep a pretrained model usable, use "
        f"--preset {DEFAULT_PRESET}."
    ]
