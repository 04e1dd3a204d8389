"""The steps of `rpq convert`: check, open, plan, convert. The command calls them in this order.

What can be said from the options alone is said in `check`, which imports nothing slow.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rpq_convert.conversion.asked import check_address, check_asked
from rpq_convert.conversion.options import BEST, FAST, QualityOptions, RunOptions
from rpq_convert.errors import FolderError, SourceError
from rpq_convert.inputs.tables import is_pairs
from rpq_convert.planning.options import PlanOptions
from rpq_convert.report.schema import read_report
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.records import REPORT
from rpq_convert.storage.room import check_free
from rpq_convert.storage.sources import is_drawn

from . import checks
from .show import chosen, fitting, progress
from .talk import detail, phase, say, warn
from .wording import as_flags

if TYPE_CHECKING:
    from rpq_convert.checkpoint.opening import Opened
    from rpq_convert.conversion.effort import Chosen
    from rpq_convert.planning.plan import Plan
    from rpq_convert.report.schema import Report


@dataclass(frozen=True)
class How:
    """How fits run, and where the result goes besides its folder."""

    device: str = "cpu"
    executor: str = "threads"
    workers: int | None = None
    push_to: str | None = None
    public: bool = False
    running: RunOptions = field(default_factory=RunOptions)


@dataclass
class Conversion:
    """One conversion of a checkpoint into a folder, as it was asked for.

    Args:
        src, out: from where to where. folder: the local folder that is made.
        calibrate: a path, `self`, or None. samples, text_field: of it.
        quality: how much care is taken, and how the result is judged. chosen: the effort that it came to.
        dry_run: only a plan is wanted.
        overwrite: replace the folder.
    """

    src: str
    out: Path
    folder: Path
    options: PlanOptions
    source: SourceOptions
    calibrate: str | None = None
    samples: int | None = None
    text_field: str | None = None
    quality: QualityOptions = QualityOptions()
    dry_run: bool = False
    overwrite: bool = False
    opened: Opened = field(init=False)
    data: Any = field(default=None, init=False)
    chosen: Chosen = field(init=False)

    def check(self, how: How) -> None:
        """Refuse what cannot end well or would do nothing, before anything slow is imported or fetched."""
        if how.device != "cpu":
            raise typer.BadParameter("fits run on the CPU in this version; use --device cpu", param_hint="--device")
        checks.needs("--public", how.public, "--push-to", how.push_to is not None)
        fed = self.calibrate is not None or self.quality.effort not in (None, FAST)
        checks.needs("--samples", self.samples, "--calibrate", fed)
        checks.needs("--text-field", self.text_field, "--calibrate", self.calibrate is not None)
        check_asked(
            self.options, calibrated=self.calibrate is not None, effort=self.quality.effort, executor=how.executor,
            workers=how.workers,
        )  # fmt: skip
        check_address(how.running.address, how.executor)
        checks.source(
            self.src,
            self.source,
            weights=(not self.dry_run and not self._is_drawn()) or self.options.measures,
            pushes=how.push_to is not None,
        )
        if self.calibrate is not None:
            self._check_data(self.calibrate)
        if (judge := self.quality.check_data) is not None and not is_pairs(judge):
            checks.data(judge, "--check-data", field=self.text_field)
        if not self.dry_run and not self.is_to_tune:
            check_free(self.out, overwrite=self.overwrite)
        if how.push_to and not self.dry_run:
            from rpq_convert.checkpoint.publishing import check_login

            check_login(how.push_to, token=self.source.token)  # hours before the upload

    @property
    def is_to_tune(self) -> bool:
        """Whether a run with effort best ended after it had written the folder, and before that was tuned."""
        if self.quality.effort != BEST or self.overwrite or not (self.folder / REPORT).is_file():
            return False
        options = read_report(self.folder / REPORT).options
        source = options.get("source") or {}
        return "tuning" not in options and (source.get("asked") or {}).get("effort") == BEST

    def _check_same(self, plan: Plan) -> None:
        """Refuse to tune a folder that these options, or this source, would not have made.

        Raises:
            FolderError: what differs.
        """
        from rpq_convert.storage.origin import difference
        from rpq_convert.storage.records import PLAN, read_manifest

        stored = read_json(self.folder / PLAN, kinds.PLAN, FolderError)
        stored["options"].pop("calibration", None)
        made = (read_manifest(self.folder).get("made") or {}).get("source") or {"files": []}
        origin = self.opened.origin
        changed = "" if origin is None else difference(made, origin.record())
        if stored != jsonlib.loads(plan.to_json()):
            changed = changed or "other settings"
        if changed:
            raise FolderError(
                f"{self.folder} is calibrated and not tuned yet, and this run has another source or other settings ({changed}); repeat them, "
                "or pass overwrite=True"
            )

    def _is_drawn(self) -> bool:
        return is_drawn(self.src, self.source, self.options.fit)

    def _check_data(self, where: str) -> None:
        if where == "self":
            checks.needs("--text-field", self.text_field, "a table as --calibrate", False)
            kind = "synthetic"
        else:
            kind = checks.data(where, "--calibrate", field=self.text_field).kind
        if self.source.factory is not None and kind not in ("tensors", "synthetic"):
            raise typer.BadParameter(
                "a factory's model has no tokenizer; give a .safetensors file of its arguments",
                param_hint="--calibrate",
            )

    def open(self) -> None:
        """Find the checkpoint by its headers, and the data to calibrate on."""
        from rpq_convert.checkpoint.opening import open_checkpoint

        with phase("opened"):
            draw = self.options.seed if self._is_drawn() else None
            self.opened = open_checkpoint(self.src, self.source, need="headers", draw=draw)
        if self.opened.model is None and not self.dry_run:
            raise SourceError(f"{self.src} has no config.json: give --factory package:callable, which builds its model")
        if self.calibrate is not None:
            self.data = self._inputs(self.calibrate)

    def _inputs(self, where: str) -> Any:
        """Return the inputs to calibrate on, or the function of the dense model that makes them."""
        from rpq_convert.inputs.files import read_inputs
        from rpq_convert.inputs.synthetic import check_own_inputs, own_inputs

        some: dict[str, Any] = {} if self.samples is None else {"samples": self.samples}
        if where == "self":
            if self.opened.model is not None and (kind := check_own_inputs(self.opened.model)) and self.source.factory:
                say(f"synthetic inputs: {kind}")
            return partial(own_inputs, seed=self.options.seed, **some)
        hub, told = self.opened.options.hub, say
        return read_inputs(
            where, self.opened.companions, model=self.opened.model, field=self.text_field, told=told, **hub, **some
        )

    def plan(self, workers: int | None = None) -> Plan:
        """Return the plan; for a conversion the weights are then at hand."""
        from rpq_convert.calibration.sensitivity import needs_sensitivities

        if needs_sensitivities(self.options) and (not self.dry_run or Path(self.src).exists()):
            say("measuring what the model is sensitive to")
            self.opened = self.opened.fetched()
            if callable(self.data) and self.opened.model is not None:
                self.data = self.data(self.opened.filled())  # written once, for the measurement and the fit
        plan = self._planned()
        if self.dry_run:
            return plan
        self._check_room(plan, workers)
        before = self.opened.slots()
        self.opened = self.opened.fetched()
        if (
            self.opened.slots() != before
        ):  # the weights say more than their headers: tied names with values of their own
            plan = self._planned()
        given = self.data is not None
        self._choose(plan)
        if self.data is not None and not given and self.options.shares and not self.options.measures:
            # calibrated weights share their bits otherwise
            plan = self._planned(told=plan.warnings)
        return plan

    def _choose(self, plan: Plan) -> None:
        """Choose the effort, say what it costs, and take synthetic inputs where it needs some and none were given."""
        from rpq_convert.conversion.effort import begun, choose

        given = {None: "", "self": "synthetic inputs"}.get(self.calibrate, self.calibrate or "")
        asked = self.quality.effort or (None if given else begun(self.folder))
        self.chosen = choose(asked, self.opened, plan, given=given)
        if self.chosen.said:
            say(self.chosen.said)
        if self.chosen.effort != FAST and self.data is None:
            self.data = self._inputs("self")

    def _check_room(self, plan: Plan, workers: int | None) -> None:
        """Refuse to fetch and fit what memory or the disk has no room for; say what is needed."""
        from rpq_convert.conversion.jobs import needed
        from rpq_convert.planning.needs import check_memory
        from rpq_convert.running.memory import available
        from rpq_convert.storage.room import bytes_to_write, check_room

        check_room(self.folder, bytes_to_write(self.folder, plan))
        check_memory(plan.jobs, available(), drawn=self.opened.is_drawn)
        say(needed(plan, workers, drawn=self.opened.is_drawn))

    def _planned(self, told: tuple[str, ...] = ()) -> Plan:
        from rpq_convert.conversion.plans import plan_opened

        with phase("planned"), progress() as tell:
            plan = plan_opened(self.opened, self.options, data=self.data, progress=partial(tell, "sensitivities"))
        warn(tuple(w for w in plan.warnings if w not in told))
        detail(chosen(plan))
        return plan

    def _asked(self) -> dict[str, Any]:
        """Return what it is calibrated on and with which care, for the model card's command."""
        where = self.calibrate if self.calibrate in (None, "self") else Path(self.calibrate).name
        effort = self.chosen.effort if where is None or self.chosen.effort == BEST else None
        given = {"calibrate": where, "samples": self.samples, "text_field": self.text_field, "effort": effort}
        return {k: v for k, v in given.items() if v}

    def convert(self, plan: Plan, how: How) -> Report:
        """Convert, and say what was not known before."""
        from rpq_convert.conversion.streaming import convert_opened
        from rpq_convert.hf.model_card import Base

        if self.is_to_tune:
            self._check_same(plan)
            return self._tuned(how)
        self.opened.base = replace(self.opened.base or Base(), asked=self._asked())
        with phase("converted"), fitting({j.name: j.dense_bytes for j in plan.jobs}) as callback:
            report = convert_opened(
                self.opened, self.folder, plan, self.data, overwrite=self.overwrite, executor=how.executor,
                workers=how.workers, progress=callback, run=how.running,
            )  # fmt: skip
        warn(tuple(w for w in report.warnings if w not in plan.warnings))
        return self._tuned(how) if self.chosen.effort == BEST else report

    def _tuned(self, how: How) -> Report:
        """Tune what was written, on the inputs that it was calibrated on."""
        from rpq_convert.checkpoint.verifying import audit
        from rpq_convert.folders import tune_written

        say(f"{self.folder} is calibrated and whole; tuning it now")
        with progress() as tell:
            tune_written(self.opened, self.folder, self.data, self.chosen.tuning, how.running, tell)
        return audit(self.folder)

    def judge(self, report: Report) -> Report:
        """Compare the result with its base, and return the report with what was found."""
        if not self.quality.check:
            return report
        from rpq_convert.conversion.checking import check_folder, judged_on

        seen = None if self.calibrate == "self" else self.calibrate
        seconds = self.quality.seconds
        judged, why = check_folder(
            self.opened, self.folder, report, seconds=seconds,
            judge=lambda: judged_on(
                self.opened, self.quality.check_data, seen=seen, samples=self.samples, field=self.text_field
            ),
            told=lambda on: say(f"comparing the result with its base on {on}, for at most {seconds:g} s (--no-check for none)"),
        )  # fmt: skip
        if why:
            say(f"not checked: {as_flags(why)}")
        return judged
