"""Keeps the routing table fresh. It is the kit's, as ensembles follow the scheduler too."""

from __future__ import annotations

from penstock_kit.routing.watch import RouteWatcher

__all__ = ["RouteWatcher"]
