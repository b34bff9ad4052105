"""A look at one host: is everything in place, does the store agree with the registry, and the way back when it does not."""

from __future__ import annotations
