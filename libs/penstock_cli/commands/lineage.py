"""`penstock lineage`: where a version comes from, and what was made from it."""

from __future__ import annotations

from penstock_cli.commands.models import VersionName
from penstock_cli.lineage_views import print_lineage
from penstock_cli.output import print_json
from penstock_cli.session import ENDPOINT, Endpoint, Json, connect


def lineage(version: VersionName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show where a version comes from, with data, jobs and metrics, and what was made from it, as a tree."""
    with connect(endpoint) as client:
        found = client.get_version(version)
        relatives = client.get_lineage(found.name)
    if json:
        print_json(
            {
                "version": found,
                "ancestors": list(relatives.ancestors),
                "descendants": list(relatives.descendants),
            }
        )
        return
    print_lineage(found, relatives)
