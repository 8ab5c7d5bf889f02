"""`report.html`: the results of a comparison in one page that opens from disk and needs no network."""

from resq_rl.experiments.report.page import write_report
from resq_rl.experiments.report.verdict import Verdict, verdict_of

__all__ = ["Verdict", "verdict_of", "write_report"]
