"""An agent finds the scheduler that takes it, and shows it the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock_kit.joining import JOIN_TOKEN_KEY
from support.agent_world import World, until

TOKEN = "a-token-of-enough-letters"


async def test_an_agent_passes_by_dead_schedulers_and_those_that_follow(
    tmp_path: Path, world: World, run_agent: Any
) -> None:
    follower = World(f"unix:{tmp_path}/follower.sock")
    follower.refusing = True
    await follower.start()
    try:
        addresses = f"unix:{tmp_path}/nobody.sock,{follower.address},{world.address}"
        async with run_agent(scheduler_address=addresses, join_token=(TOKEN, "another-token-0123456789")):
            await until(lambda: world.statuses, "the agent attached")
            assert follower.attaches == 1
            assert world.metadata[JOIN_TOKEN_KEY] == TOKEN
    finally:
        await follower.stop()
