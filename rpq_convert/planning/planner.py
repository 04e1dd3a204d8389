"""Planner: decides for every slot whether and how it is converted. Pure: reads names, shapes and types alone.

Three steps, each a function of values: what the options say of a slot (`settings_of`), the spec that these settings make of its
shape (`spec_of`), and the job, or the reason why it stays dense (`job_of`).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rpq_convert.core.axes import WeightView
from rpq_convert.core.rotation import fitting
from rpq_convert.core.sizes import parse_size
from rpq_convert.core.spec import Spec, dtype_name, dtype_of
from rpq_convert.errors import PlanError
from rpq_convert.planning.options import DEFAULT_PRESET, MOST_CODED, PlanOptions
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.planning.rules import SETTINGS, SIZES, Rule, Settings, load_preset, overlay, settings_for, split_bits
from rpq_convert.planning.slots import Slot

# Where an output has no more inputs than this (depthwise kernels, the convolution of a picture's pixels), `bits` means 8 of them:
# errors have nothing to average out over, and the bytes are few. EfficientNet-Lite0 at 4 bits: 12 % of its answers stay the
# dense model's without, 38 % with it, in 3 % more bytes.
FEW = 32
MAX_OUTLIERS = 0.1
# Entropy-coded weights: fewer than LEAST_CODED do not pay for frequencies and codewords, about 1 KB; above MOST_CODED bits 256
# codewords are too few for what a longer code could say.
LEAST_CODED = 1 << 14
# Matrices that get one scale for each of their inputs where codes are entropy-coded: fewer outputs do not pay for them; many more
# outputs than inputs are a head, which loses by them, as tables do (docs/decisions.md).
LEAST_OUTPUTS, MOST_OUTPUTS = 128, 8


@dataclass(frozen=True)
class Policy:
    """What the options of a plan mean for its slots.

    Args:
        base: the settings of every parameter. preset_rules: change them, first match wins.
        rules: the user's, over those. forced: settings that no rule can change.
        only, never: patterns of what is converted, and of what is not.
    """

    base: Mapping[str, Any]
    preset_rules: Sequence[Rule]
    rules: Sequence[Rule]
    forced: Mapping[str, Any]
    only: Sequence[Rule]
    never: Sequence[Rule]


def policy_of(options: PlanOptions, head_rules: Sequence[Rule] | None = None) -> Policy:
    """Return what options mean.

    Args:
        head_rules: the rules that `codebooks="heads"` means for this model, if it has attention heads.

    Raises:
        PlanError: an unknown preset, or heads where there are none.
    """
    base: dict[str, Any] = {"books": 1, "codebook_dtype": "float16", "scales": "float16"}
    preset_rules: Sequence[Rule] = ()
    if options.codebooks == "heads":
        if head_rules is None:
            raise PlanError(
                "codebooks='heads' needs a model with attention heads; use bits, dim or a number of codebooks"
            )
        base, preset_rules = {"books": "blocks", "codebook_dtype": "float32", "scales": "none"}, head_rules
    elif options.codebooks is not None:
        base = {"num_codebooks": int(options.codebooks), "codebook_dtype": "float32", "scales": "none"}
    elif options.preset is not None or (options.bits is None and options.dim is None):
        preset = load_preset(options.preset or DEFAULT_PRESET)
        base, preset_rules = dict(preset.settings), preset.rules
    if options.bits is not None:
        base = overlay(base, {"bits": options.bits, "storage": "rans"} if options.coded else {"bits": options.bits})
    if options.dim is not None:
        size = {"dim": options.dim} if options.stages is None else {"dim": options.dim, "stages": options.stages}
        base = overlay(base, size)
        preset_rules = [Rule(r.match, overlay(r.settings, size)) for r in preset_rules]
    asked = {name: getattr(options, name, None) for name in SETTINGS if name not in (*SIZES, "stages")}
    forced = {name: value for name, value in asked.items() if value is not None and value is not False}
    only, never = ([Rule(p) for p in patterns] for patterns in (options.include, options.exclude))
    return Policy(base, preset_rules, options.rules, forced, only, never)


def make_plan(
    slots: Sequence[Slot],
    options: PlanOptions,
    *,
    head_rules: Sequence[Rule] | None = None,
    warnings: Sequence[str] = (),
) -> Plan:
    """Plan with one size for all parameters, as far as rules do not say otherwise; budget.py chooses sizes.

    Args:
        slots: the model, from `walk` or `walk_headers`.
        options: what is asked; `bits` is rounded down to a size that a layout has.
        head_rules: as for `policy_of`.
        warnings: for the plan to say.

    Raises:
        PlanError: unknown preset or setting, a rule that matched nothing, a length that the number of codebooks does not
            divide.
    """
    policy = policy_of(options, head_rules)
    patterns = (*policy.rules, *policy.only, *policy.never)
    hits: Counter[int] = Counter()
    jobs: list[Job] = []
    skips: list[Skip] = []
    floating = dtype_of(options.dtype) if options.dtype else None
    for slot in slots:
        hits.update(id(r) for r in patterns if not slot.buffer and r.matches(slot))
        stored = floating if floating is not None and slot.dtype.is_floating_point else slot.dtype
        decision = _decide(slot, stored, policy, options.seed)
        if isinstance(decision, Job):
            jobs.append(replace(decision, reproducible=options.reproducible))
        else:
            skips.append(
                Skip(slot.name, slot.aliases, slot.layer, slot.shape, dtype_name(stored), decision, slot.buffer)
            )
    if unmatched := [r.match for r in patterns if not hits[id(r)]]:
        some = ", ".join(s.name for s in slots[:3])
        raise PlanError(f"no parameter matches {', '.join(map(repr, unmatched))}; names look like {some}")
    parts = tuple(dict.fromkeys(part for slot in slots for part in slot.parts))
    plan = Plan(tuple(jobs), tuple(skips), options.record(), parse_size(options.max_shard_size), tuple(warnings), parts)
    return replace(plan, warnings=(*warnings, *warnings_of(plan)))


def _decide(slot: Slot, stored: torch.dtype, policy: Policy, seed: int) -> Job | str:
    """Return the slot's job, or the reason why it stays dense."""
    found = settings_of(slot, policy)
    if isinstance(found, str):
        return found
    settings, view, by = found
    spec = spec_of(slot.name, slot.shape, view, settings)
    few = view.axis == "out" and view.matrix_shape(slot.shape, "in")[1] <= FEW
    if few and settings.bits is not None and spec.bits < 8 and not settings.own_bits:
        spec = spec_of(slot.name, slot.shape, view, settings.sized(bits=8))
        by += f", and 8 bits for at most {FEW} inputs"
    return job_of(slot, stored, view, settings, spec, by, seed)


def settings_of(slot: Slot, policy: Policy) -> tuple[Settings, WeightView, str] | str:
    """Return a slot's settings, its view and what decided them; or the reason why it stays dense.

    Raises:
        PlanError: a rule's view that does not fit the parameter.
    """
    merged, rule = settings_for(slot, policy.base, policy.preset_rules)
    by = f"preset rule {rule.match!r}" if rule else "the settings for everything"
    own = next((r for r in policy.rules if r.matches(slot)), None)
    if own is not None:
        merged, by = overlay(merged, own.settings), f"rule {own.match!r}"
        if any(k in own.settings for k in ("bits", "dim", "num_codebooks")) and "skip" not in own.settings:
            merged.pop("skip", None)
    if slot.reason:
        return slot.reason
    if any(r.matches(slot) for r in policy.never):
        return "excluded"
    if policy.only and not any(r.matches(slot) for r in policy.only):
        return "not included"
    if merged.get("skip"):
        return f"skipped by {by}"
    try:
        view = WeightView(merged["view"]) if "view" in merged else slot.view
        if view is None:
            return f"{slot.unknown}; {CONVERTS.format(len(slot.shape))}"
        view.check(slot.shape)
    except (ValueError, AttributeError) as e:
        raise PlanError(f"{slot.name}: {e}") from None
    if 0 in slot.shape:
        return "empty"
    forced = {k: v for k, v in policy.forced.items() if k != "axis" or slot.view is None or view.axis == "out"}
    own_bits = own is not None and "bits" in own.settings
    return Settings(**overlay(merged, forced), own_bits=own_bits), view, by


def spec_of(name: str, shape: tuple[int, ...], view: WeightView, settings: Settings) -> Spec:
    """Return the spec that settings make of one parameter.

    Raises:
        PlanError: no size, a size that the shape does not allow, or a value that no spec can have.
    """
    try:
        if settings.coded and settings.bits is not None and (coded := _by_rate(shape, view, settings, settings.bits)):
            return coded
        if settings.num_codebooks is not None:
            return _by_count(shape, view, settings, settings.num_codebooks)
        if settings.dim is not None:
            return _by_dim(shape, view, settings, settings.dim, settings.stages)
        if settings.bits is None:
            raise PlanError("no size is set; give bits, dim or num_codebooks")
        spec = _by_dim(shape, view, settings, *split_bits(settings.bits))
        if spec.stages == 1:
            return spec
        # codebooks of a small parameter outweigh its codes: one stage may be more bits in fewer bytes
        one = _by_dim(shape, view, settings, int(8 // settings.bits), 1)
        return min(one, spec, key=lambda s: sum(s.nbytes(view, shape).values()))
    except (PlanError, ValueError, TypeError, KeyError) as e:
        raise PlanError(f"{name} {list(shape)}: {e}") from None


def _by_count(shape: tuple[int, ...], view: WeightView, settings: Settings, count: int) -> Spec:
    """One codebook for each of `count` equal sub-vectors."""
    if not isinstance(count, int) or count < 1:
        raise PlanError(f"num_codebooks must be a whole number of at least 1, not {count!r}")
    axis = settings.axis or view.axis
    length = view.matrix_shape(shape, axis)[1]
    if length % count:
        near = sorted((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - count))[:3]
        raise PlanError(f"{count} codebooks do not divide its length of {length}; try {', '.join(map(str, near))}")
    return _spec(shape, view, settings, axis, length // count, settings.stages, count)


def _by_dim(shape: tuple[int, ...], view: WeightView, settings: Settings, dim: int, stages: int) -> Spec:
    # Short sub-vectors of one codebook lose nothing along the inputs (measured: docs/decisions.md), where lookups
    # are up to 2.5 times as fast.
    short = dim in (1, 2) and stages == 1 and settings.books == 1
    axis = settings.axis or ("in" if short else view.axis)
    return _spec(shape, view, settings, axis, dim, stages, settings.books)


def _by_rate(shape: tuple[int, ...], view: WeightView, settings: Settings, bits: float) -> Spec | None:
    """Return the spec of entropy-coded weights; None where one byte for a code is as good, or frequencies would weigh too much."""
    if bits > MOST_CODED or math.prod(shape) < LEAST_CODED or settings.books != 1:
        return None
    spec = _spec(shape, view, settings, settings.axis or "in", 1, 1, 1)
    outputs, inputs = view.matrix_shape(shape, "in")
    layer = len(view.axes) == 2 and view.axis == "out" and LEAST_OUTPUTS <= outputs <= MOST_OUTPUTS * inputs
    if settings.input_scales is None and layer and not spec.rotation:
        spec = replace(spec, input_scales="float16")
    return replace(spec, storage="rans", rate=float(bits))


def _spec(
    shape: tuple[int, ...], view: WeightView, settings: Settings, axis: str, dim: int, stages: int, books: int | str
) -> Spec:
    """Return the spec of sub-vectors of this length along this axis."""
    if books != "blocks" and (not isinstance(books, int) or isinstance(books, bool)):
        raise PlanError(f"books must be 'blocks' or a whole number, not {books!r}")
    length, inputs = view.matrix_shape(shape, axis)[1], view.matrix_shape(shape, "in")[1]
    blocks = math.ceil(length / dim) if isinstance(dim, int) and dim > 0 else 1
    rotation, share = settings.rotation, settings.outliers
    if not isinstance(rotation, int) or isinstance(rotation, bool) or rotation < 0:
        raise PlanError(f"rotation must be a whole number, 0 for none, not {rotation!r}")
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= MAX_OUTLIERS:
        raise PlanError(f"outliers must be a share of the weights from 0 to {MAX_OUTLIERS}, not {share!r}")
    return Spec(
        dim=dim,
        books=blocks if isinstance(books, str) else min(books, blocks),
        stages=stages,
        axis=axis,
        codebook_dtype=settings.codebook_dtype,
        scales=None if settings.scales == "none" else settings.scales,
        input_scales=None if settings.input_scales == "none" or "expert" in view.axes else settings.input_scales,
        layout="rows" if view.axis == "in" and axis == "in" else "blocks",
        rotation=fitting(rotation, inputs),
        outliers=0 if "expert" in view.axes else round(share * inputs),
    )


def job_of(
    slot: Slot, stored: torch.dtype, view: WeightView, settings: Settings, spec: Spec, by: str, seed: int
) -> Job | str:
    """Return the job of a slot; or the reason why it stays dense, where it would grow.

    Args:
        stored: dtype of the expanded weight. by: what decided its settings. seed: of the whole plan.
    """
    fit = "ecvq" if spec.rate is not None else settings.fit or "kmeans"
    if fit == "ecvq" and spec.rate is None:
        fit = "kmeans"
    if fit == "kmeans" and spec.stages > 1:
        fit = "additive"
    if fit == "random":  # no weight is larger than the others
        spec = replace(spec, outliers=0, input_scales=None)
    job = Job(
        name=slot.name, aliases=slot.aliases, layer=slot.layer, shape=slot.shape, dtype=dtype_name(stored),
        view=view.names, spec=spec, fit=fit, seed=job_seed(seed, slot.name), rule=by, padding_idx=slot.padding_idx,
    )  # fmt: skip
    size = sum(job.nbytes.values())
    if size >= job.dense_bytes and not settings.grow:
        return f"would grow from {job.dense_bytes:,} to {size:,} bytes"
    return job


def job_seed(seed: int, name: str) -> int:
    """Return a seed per parameter, so that results depend on no order of execution."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


def warnings_of(plan: Plan) -> list[str]:
    """Say plainly what a user may not expect: which weights stay dense, and where most of the weights' information will go."""
    return [*_left_dense(plan), *_coarse(plan)]


CONVERTS = "a rule with a view of {} converts it"
MUCH = 0.01  # the share of a model's bytes from which weights that could have been converted are named in a warning


def _left_dense(plan: Plan) -> list[str]:
    dense = [s for s in plan.skips if not s.buffer]
    if not plan.jobs:
        reasons = Counter(s.reason for s in dense)
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3)) or "the model has no parameters"
        return [f"nothing is converted: {why}"]
    whole = sum(j.dense_bytes for j in plan.jobs) + sum(s.nbytes for s in plan.skips)
    known = CONVERTS.partition("{}")[0]
    missed = sorted((s for s in dense if known in s.reason or s.reason.startswith("held by ")), key=lambda s: -s.nbytes)
    if sum(s.nbytes for s in missed) < MUCH * whole:
        return []
    some = "; ".join(f"{s.name} {list(s.shape)}: {s.reason}" for s in missed[:3])
    more = f"; and {len(missed) - 3} more" if len(missed) > 3 else ""
    return [
        f"{len(missed)} weights of two or more axes stay dense. {some}{more} (rules=, or register_layer for a class)"
    ]


def _coarse(plan: Plan) -> list[str]:
    fitted = [j for j in plan.jobs if not j.is_random]
    weights = sum(math.prod(j.shape) for j in fitted)
    if not weights:
        return []
    error = sum(math.prod(j.shape) * j.expected_error for j in fitted) / weights
    bits = sum(math.prod(j.shape) * j.spec.bits for j in fitted) / weights
    if error < 0.3:
        return []
    return [
        f"{bits:.2g} code bits per weight keep little of pretrained weights (expected relative squared error {error:.2f} "
        f"of 1): this size suits random codebooks and training (fit='random'). To keep a pretrained model usable, use "
        f"preset={DEFAULT_PRESET!r}."
    ]
