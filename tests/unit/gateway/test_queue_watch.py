"""What a gateway learns of the queues that it shares with others."""

from collections.abc import Sequence

from penstock_gateway.domain.admission import Waitlist
from penstock_gateway.domain.statistics import Counters
from penstock_gateway.usecases.watch import QueueWatch
from penstock_kit.errors import Unavailable

NORMAL = 1


class Queues:
    """Redis, as far as the watch knows it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}
        self.counters: list[Counters] = []
        self.away = False
        self.asked: list[list[str]] = []

    async def depths(self, queues: Sequence[str]) -> list[tuple[int, ...]]:
        if self.away:
            raise Unavailable("Redis is away.")
        self.asked.append(list(queues))
        return [self.found[queue] for queue in queues]

    async def read(self, queue: str) -> list[Counters]:
        return self.counters


async def test_only_queues_in_use_are_asked_for() -> None:
    waitlists = {name: Waitlist(name) for name in ("a", "b")}
    queues = Queues()
    queues.found = {"a": (0, 40, 0), "b": (0, 0, 0)}
    watch = QueueWatch(lambda: waitlists, queues)
    await watch.look(1.0)
    waitlists["a"].backlogs[NORMAL].enter(1.0)
    await watch.look(1.1)
    assert queues.asked == [["a"]]
    assert waitlists["a"].backlogs[NORMAL].others == 39
    # Others are followed until they are gone, even if nothing waits here any more.
    waitlists["a"].backlogs[NORMAL].leave()
    queues.found["a"] = (0, 0, 0)
    await watch.look(1.2)
    await watch.look(1.3)
    assert queues.asked == [["a"], ["a"]]
    assert waitlists["a"].backlogs[NORMAL].others == 0


async def test_while_redis_is_away_a_gateway_reckons_for_itself() -> None:
    waitlist = Waitlist("a")
    queues = Queues()
    queues.found = {"a": (0, 40, 0)}
    watch = QueueWatch(lambda: {"a": waitlist}, queues)
    waitlist.backlogs[NORMAL].enter(1.0)
    await watch.look(1.0)
    assert waitlist.backlogs[NORMAL].others == 39
    queues.away = True
    await watch.look(1.1)
    assert waitlist.backlogs[NORMAL].others == 0


async def test_the_size_of_requests_is_learned_from_the_replicas_counters() -> None:
    waitlist = Waitlist("a")
    waitlist.offer(1, 32)
    queues = Queues()
    queues.found = {"a": (0, 0, 0)}
    watch = QueueWatch(lambda: {"a": waitlist}, queues)
    normal = waitlist.backlogs[NORMAL]
    normal.enter(1.0)
    await watch.look(1.0)
    assert normal.room == 64
    queues.counters = [Counters(success_count=10, inference_count=160), Counters(success_count=10)]
    await watch.look(1.5)  # not each time
    assert normal.room == 64
    await watch.look(2.1)
    assert normal.room == 2 * 32 / 8
    waitlist.offer(2, 32)  # a new routing table does not know better
    assert normal.room == 2 * 2 * 32 / 8
