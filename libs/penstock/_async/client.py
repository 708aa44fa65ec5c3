"""The client as users know it."""

from __future__ import annotations

from penstock._async.datasets import AsyncDatasets
from penstock._async.inference import AsyncInference
from penstock._async.jobs import AsyncJobs
from penstock._async.projects import AsyncProjects


class AsyncClient(AsyncInference, AsyncDatasets, AsyncJobs, AsyncProjects):
    """Everything a mesh offers, over one gRPC channel to a gateway.

    ::

        from penstock import AsyncClient

        async with AsyncClient("127.0.0.1:8080") as client:
            version = await client.push("digits.pt2", model="digits", alias="champion")
            deployment = await client.deploy("digits", "digits@champion")
            await client.wait_for_deployment("digits", revision=deployment.revision)
            prediction = await client.predict("digits", images)

    Errors are those of `penstock.errors`. Calls may run at the same time.
    """
