"""`python -m penstock_gateway` and `penstock-gateway`: run one gateway process."""

from __future__ import annotations

import logging
import sys

from penstock_gateway.app import serve
from penstock_gateway.settings import GatewaySettings
from penstock_kit.errors import PenstockError
from penstock_kit.lifecycle import run
from penstock_kit.telemetry import configure_logging

_USAGE = """usage: penstock-gateway

Runs one gateway process until SIGTERM. Settings are environment variables:
"""


def main() -> int:
    """Run the gateway; return its exit status."""
    if len(sys.argv) > 1:
        lines = (
            f"  PENSTOCK_{name.upper()}  {field.description} [{field.default}]"
            for name, field in GatewaySettings.model_fields.items()
        )
        print(_USAGE + "\n".join(lines))
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    try:
        settings = GatewaySettings.load()
    except PenstockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    configure_logging("penstock-gateway", level=settings.log_level, style=settings.log_format)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    return run(lambda stopping: serve(settings, stopping))


if __name__ == "__main__":
    sys.exit(main())
