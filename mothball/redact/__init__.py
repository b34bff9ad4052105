"""Secrets in what leaves the fleet: found by rule, replaced by keyed pseudonyms, looked for once more at the end.

`Redactor` finds and replaces, `Rules` are what it looks for, `Rescan` reads finished bytes once more and reports what is left,
`mask` is the one for log lines and error messages: no key, no registry. RE2 sees every hostile byte, so the time is linear in what
is read. RE2 is imported on first use.
"""

from __future__ import annotations

from mothball.redact.engine import Redactor
from mothball.redact.files import is_text
from mothball.redact.key import mask, redactor_for
from mothball.redact.rescan import Finding, Rescan
from mothball.redact.rules import Rule, Rules

__all__ = ["Finding", "Redactor", "Rescan", "Rule", "Rules", "is_text", "mask", "redactor_for"]
