"""What the models of an ensemble's steps are, asked of the mesh."""

from __future__ import annotations

from penstock._async.models import AsyncModels
from penstock.ensemble_messages import model_type, steps_from_proto
from penstock.ensemble_types import ModelType
from penstock.ensembles import Step
from penstock.errors import NotFound
from penstock.names import parse_version, resource
from penstock.packaging.bundle import Bundle
from penstock.packaging.ensemble_signature import completed
from penstock.scheduler.v1 import deployment_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as scheduler


class AsyncEnsembles(AsyncModels):
    """Ensembles before they are pushed."""

    async def complete_ensemble(self, bundle: Bundle) -> Bundle:
        """Return an ensemble's bundle with all that the models of its steps say; others as they are.

        Raises:
            FailedPrecondition: What one step gives does not fit what another takes; reason MANIFEST_MISMATCH.
            InvalidArgument: The type of a tensor is neither described nor known from deployed models.
        """
        if not bundle.manifest.ensemble.steps:
            return bundle
        models = {}
        for step in steps_from_proto(bundle.manifest.ensemble):
            found = await self._model_of(step)
            if found is not None:
                models[step.name] = found
        return completed(bundle, models)

    async def _model_of(self, step: Step) -> ModelType | None:
        """Return what a step calls now; None if there is nothing of that name yet."""
        request = scheduler.GetDeploymentRequest(name=resource("deployments", step.deployment))
        try:
            deployment = await self._unary(self._scheduler.GetDeployment, request)
            targets = list(deployment.serving or deployment.targets)
            targets.sort(key=lambda target: -target.weight)
            for target in targets:
                version = await self.get_version(_version_of(target))
                selector = step.selector
                if not selector or selector == str(version.number) or selector[1:] in version.aliases:
                    return model_type(version.manifest, str(parse_version(version.name)))
        except NotFound:
            return None
        return None


def _version_of(target: deployment_pb2.Target) -> str:
    if number := target.resolved_version or target.version:
        return f"{target.model}/versions/{number}"
    return f"{target.model}/aliases/{target.alias}" if target.alias else target.model
