"""The routing table. It is the kit's, as ensembles route by it too."""

from __future__ import annotations

from penstock_kit.routing.table import CachePolicy, Route, Table, Target, not_ready, split_name

__all__ = ["CachePolicy", "Route", "Table", "Target", "not_ready", "split_name"]
