"""Deleting a workspace's directory, the one thing here that cannot be undone (design, section 7; ADR 0013).

No bytes go that no capture holds: a capture of the latest state was read back, and every file was compared with it by content
after nobody could reach it any more. What it does not hold (large files, unpushed commits, ...) refuses the purge, unless a person
insists.
"""

from __future__ import annotations

from mothball.purge.receipt import Gap, Receipt, explain_gaps, gap_dicts
from mothball.purge.run import Examination, Purge, open_purge, put_back_interrupted

__all__ = ["Examination", "Gap", "Purge", "Receipt", "explain_gaps", "gap_dicts", "open_purge", "put_back_interrupted"]
