"""The steps of `rpq convert`: check, open, plan, convert. The command calls them in this order.

What can be said from the options alone is said in `check`, which imports nothing slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rpq_convert.errors import FolderError, SourceError
from rpq_convert.planning.options import PlanOptions
from rpq_convert.storage.options import SourceOptions

from .show import progress, say, warn

if TYPE_CHECKING:
    from rpq_convert.checkpoint.opening import Opened
    from rpq_convert.planning.plan import Plan
    from rpq_convert.report.schema import Report


@dataclass
class Conversion:
    """One conversion of a checkpoint into a folder, as it was asked for.

    Args:
        src, folder: from where to where.
        calibrate: a path, `self`, or None. samples, text_field: of it.
        dry_run: only a plan is wanted.
        overwrite: replace the folder.
        quiet: say warnings only.
    """

    src: str
    folder: Path
    options: PlanOptions
    source: SourceOptions
    calibrate: str | None = None
    samples: int | None = None
    text_field: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    quiet: bool = False
    opened: Opened = field(init=False)
    data: Any = field(default=None, init=False)

    def check(self, *, device: str, push_to: str | None) -> None:
        """Refuse what cannot end well, before anything slow is imported or fetched."""
        if device != "cpu":
            raise typer.BadParameter("fits run on the CPU in this version; use --device cpu", param_hint="--device")
        if not self.dry_run and self.folder.exists() and not self.overwrite:
            raise FolderError(f"{self.folder} already exists; choose another folder or pass --overwrite")
        if push_to and not self.dry_run:
            from rpq_convert.checkpoint.publishing import check_login

            check_login(push_to, token=self.source.token)  # hours before the upload

    def open(self) -> None:
        """Find the checkpoint by its headers, and the data to calibrate on."""
        from rpq_convert.checkpoint.opening import open_checkpoint

        self.opened = open_checkpoint(self.src, self.source, need="headers")
        if self.opened.model is None and not self.dry_run:
            raise SourceError(f"{self.src} has no config.json: give --factory package:callable, which builds its model")
        if self.calibrate is not None:
            self.data = self._inputs(self.calibrate)

    def _inputs(self, where: str) -> Any:
        """Return the inputs to calibrate on, or the function of the dense model that makes them."""
        from rpq_convert.inputs.files import read_inputs
        from rpq_convert.inputs.synthetic import own_inputs

        if self.source.factory is not None and not where.endswith(".safetensors"):
            raise typer.BadParameter(
                "a factory's model has no tokenizer; give a .safetensors file of its arguments",
                param_hint="--calibrate",
            )
        some: dict[str, Any] = {} if self.samples is None else {"samples": self.samples}
        if where == "self":
            return partial(own_inputs, seed=self.options.seed, **some)
        hub = self.opened.options.hub
        return read_inputs(where, self.opened.src, model=self.opened.model, field=self.text_field, **hub, **some)

    def plan(self) -> Plan:
        """Return the plan; for a conversion the weights are then at hand."""
        from rpq_convert.calibration.sensitivity import needs_sensitivities

        if needs_sensitivities(self.options) and (not self.dry_run or Path(self.src).exists()):
            if not self.quiet:
                say("measuring what the model is sensitive to")
            self.opened = self.opened.fetched()
            if callable(self.data) and self.opened.model is not None:
                self.data = self.data(self.opened.filled())  # written once, for the measurement and the fit
        plan = self._planned()
        if self.dry_run:
            return plan
        before = self.opened.slots()
        self.opened = self.opened.fetched()
        if (
            self.opened.slots() != before
        ):  # the weights say more than their headers: tied names with values of their own
            plan = self._planned()
        return plan

    def _planned(self) -> Plan:
        from rpq_convert.conversion.plans import plan_opened

        plan = plan_opened(self.opened, self.options, data=self.data)
        warn(plan.warnings)
        return plan

    def convert(self, plan: Plan, *, executor: str, workers: int | None) -> Report:
        """Convert, and say what was not known before."""
        from rpq_convert.conversion.streaming import convert_opened

        with progress(plan, quiet=self.quiet) as callback:
            how: dict[str, Any] = {"executor": executor, "workers": workers, "progress": callback}
            report = convert_opened(self.opened, self.folder, plan, self.data, overwrite=self.overwrite, **how)
        warn(tuple(w for w in report.warnings if w not in plan.warnings))
        return report
