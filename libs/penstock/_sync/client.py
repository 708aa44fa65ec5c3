# Made from _async/client.py by libs/make_sync.py; edit that and run it again.
"""The client as users know it."""

from __future__ import annotations

from penstock._sync.datasets import Datasets
from penstock._sync.inference import Inference
from penstock._sync.jobs import Jobs
from penstock._sync.projects import Projects


class Client(Inference, Datasets, Jobs, Projects):
    """Everything a mesh offers, over one gRPC channel to a gateway.

    ::

        from penstock import Client

        with Client("127.0.0.1:8080") as client:
            version = client.push("digits.pt2", model="digits", alias="champion")
            deployment = client.deploy("digits", "digits@champion")
            client.wait_for_deployment("digits", revision=deployment.revision)
            prediction = client.predict("digits", images)

    Errors are those of `penstock.errors`. Calls may run at the same time.
    """
