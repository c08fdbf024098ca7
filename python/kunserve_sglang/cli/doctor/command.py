"""The command itself; only its flags are known to the others."""

from __future__ import annotations

import argparse

import msgspec

from kunserve_sglang.api.errors import Refused
from kunserve_sglang.cli.doctor.finding import Level
from kunserve_sglang.cli.doctor.gathering import gather
from kunserve_sglang.cli.doctor.options import asked_by
from kunserve_sglang.cli.doctor.report import diagnose, diagnosis_view
from kunserve_sglang.cli.session import Session


def examine(session: Session, flags: argparse.Namespace) -> None:
    """Raises `Refused` if this host would not serve as it was asked to."""
    diagnosis = diagnose(gather(asked_by(flags)))
    if session.raw:
        session.write(msgspec.json.encode(diagnosis))
    else:
        session.console.print(diagnosis_view(diagnosis), soft_wrap=True)
    if not diagnosis.serves:
        errors = sum(finding.level is Level.ERROR for finding in diagnosis.findings)
        raise Refused(f"{errors} error{'s'[: errors > 1]} would keep this host from serving")
