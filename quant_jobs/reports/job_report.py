"""The report of a quantize run: `job_report.json` for machines, `job_report.html` for people.

Both lie beside the artifact and belong to no digest. The accuracy of the artifact is the subject
of another report, made from an evaluation (`quant_jobs report`).
"""

from __future__ import annotations

from pathlib import Path

from deepseek.artifact.manifest import JOB_REPORTS
from deepseek.files import write_atomic
from quant_jobs.reports.job_record import JobRecord

REPORT_FILE, PAGE_FILE = JOB_REPORTS


def write_job_report(output: Path, record: JobRecord) -> None:
    """Write OUTPUT/job_report.json and OUTPUT/job_report.html, each whole or not at all."""
    # Imported here because it loads matplotlib, which a job needs at its end only.
    from quant_jobs.reports.job_page import render

    write_atomic(output / REPORT_FILE, (record.model_dump_json(indent=1) + "\n").encode())
    write_atomic(output / PAGE_FILE, render(record).encode())
