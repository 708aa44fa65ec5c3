"""What a job made goes to a deployment as a canary, as soon as the registry has it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from penstock_kit.errors import PenstockError, Unavailable
from penstock_scheduler.domain.job import Job
from penstock_scheduler.domain.rollout import RolloutPolicy, Strategy, check_policy
from penstock_scheduler.domain.validate import TargetAsked
from penstock_scheduler.usecases.deployments import Asked, Changes, Deployments

_NAMESPACE = uuid.UUID("5b0c3c0e-8f3b-53f5-8a0e-0d6c1be1c1f7")
# With its defaults filled in, as those of callers are.
_CANARY = check_policy(RolloutPolicy(strategy=Strategy.CANARY))


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to become of a job's result.

    Attributes:
        deployment: who is to serve it.
        model: the model of the version that was made.
        number: its number.
        passed: whether it passed its gate.
    """

    deployment: str
    model: str
    number: int
    passed: bool


class JobCanaries:
    """Gives results to deployments, each once.

    Args:
        deployments: changes them.
        wish_of: reads what a job wishes; None if it wishes nothing.
    """

    def __init__(self, deployments: Deployments, wish_of: Callable[[Job], Wish | None]) -> None:
        self._deployments = deployments
        self._wish_of = wish_of

    async def begin(self, job: Job) -> str:
        """Begins the canary that a job asks for; says what came of it, nothing if it asks for none.

        May be called again: the change is known by the job. A deployment that cannot take the version does
        not make the job fail, which has done its work.

        Raises:
            Unavailable: ask again.
        """
        wish = self._wish_of(job)
        if wish is None:
            return ""
        brief = f"{wish.model}:{wish.number}"
        if not wish.passed:
            return f"{wish.deployment} does not get {brief}, as it did not pass its gate."
        fields = {"targets"}
        try:
            policy = (await self._deployments.get(wish.deployment)).deployment.rollout_policy
            if policy is None:
                policy = _CANARY
                fields.add("rollout_policy")
            await self._deployments.update(
                wish.deployment,
                Changes(
                    Asked((TargetAsked(wish.model, 100, version=wish.number),), rollout_policy=policy),
                    frozenset(fields),
                ),
                actor=f"jobs/{job.id}",
                request_id=str(uuid.uuid5(_NAMESPACE, f"{job.id} {job.create_time.isoformat()}")),
                fingerprint=f"canary of jobs/{job.id}",
            )
        except Unavailable:
            raise
        except PenstockError as error:
            return f"{wish.deployment} does not get {brief}: {error}"
        return (
            f"{wish.deployment} gets {brief} by its rollout; see `penstock rollout watch {wish.deployment}`."
        )
