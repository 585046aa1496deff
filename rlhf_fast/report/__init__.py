"""What a run did, for people: report.html and a table for the terminal, made from the files in the run's folder."""

from rlhf_fast.report.page import write_report
from rlhf_fast.report.table import summary_table

__all__ = ["summary_table", "write_report"]
