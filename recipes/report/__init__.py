"""Report: OUTPUT_DIR/report.html, a run's curves and rollouts in one page that needs nothing but a browser."""

from .report import Report, from_files

__all__ = ["Report", "from_files"]
