"""The pure core: `plan(snapshot) → Plan`, in the manner of Nomad's scheduler.

`feasible` says where a replica could run and why not elsewhere, `rank` which of those places is
best, `plan` what should change.
"""

from penstock_scheduler.domain.planner.jobs import JobPolicy
from penstock_scheduler.domain.planner.plan import Plan, Policy, plan
from penstock_scheduler.domain.planner.snapshot import Snapshot

__all__ = ["JobPolicy", "Plan", "Policy", "Snapshot", "plan"]
