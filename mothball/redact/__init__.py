"""Secrets in what leaves the fleet: found by rule, replaced by keyed pseudonyms, looked for once more at the end."""
