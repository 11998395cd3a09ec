"""What the program shows on a terminal: progress, tables, colours; plain text where there is none."""

from __future__ import annotations

from acestep_ray.terminal.console import VERBOSE, is_terminal, is_verbose, rich_console
from acestep_ray.terminal.escapes import visible, visible_line, visible_message
from acestep_ray.terminal.progress import Progress
from acestep_ray.terminal.streams import guard_streams, replace_unencodable
from acestep_ray.terminal.tables import column_table, fact_table, show_error, show_line, show_summary

__all__ = [
    "VERBOSE",
    "Progress",
    "column_table",
    "fact_table",
    "guard_streams",
    "is_terminal",
    "is_verbose",
    "replace_unencodable",
    "rich_console",
    "show_error",
    "show_line",
    "show_summary",
    "visible",
    "visible_line",
    "visible_message",
]
