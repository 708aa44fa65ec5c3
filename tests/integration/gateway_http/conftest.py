import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from support.http_world import ToyWorld, toy_world


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Let all run on the loop that serves; the one of the standard library calls back in another order."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
async def world() -> AsyncIterator[ToyWorld]:
    async with toy_world() as made:
        yield made
