"""The queue between gateways and replicas, on Redis Streams (6.2 or newer).

    keys         every Redis key; ``queue_name(deployment, version, digest)``
    messages     ``Request``, ``Reply`` and how a reply is packed
    ports        the promises of both ends, as protocols: ``Sender``, ``Reader``
    sender       ``RequestSender``, the gateway's end (asyncio); ``ledger`` and ``waiting`` are its books
    reader       ``QueueReader``, the replica's end (threads); ``answers`` is what it writes, ``shares``
                 how much it reads of each priority
    reclaim      what becomes of the requests of a dead replica: ``await reclaim(url, queue, consumer)``
    statistics   what operators look at: ``read_statistics``, ``read_depth``, ``dead_letters``
    connection   Redis over one asyncio socket; ``blocking`` is its synchronous sister, ``address`` reads
                 their URLs and ``resp`` writes their commands
    memory       ``MemorySender``, ``MemoryReader``: the same promises within one process, for tests

The gateway:

    sender = RequestSender(settings.redis_url, "gateway-7f3a")
    await sender.start()
    reply = await sender.submit(queue, RequestHeader(deadline_unix_micros=…, …), payload)

The replica, with ``heartbeat`` and ``reclaim_lost`` each second in a thread of their own:

    reader = QueueReader(settings.redis_url, queue, f"{replica_id}.{incarnation}")
    while serving:
        requests = reader.read(32, block_ms=100)
        reader.finish([(request, ReplyHeader(), compute(request)) for request in requests])

Delivery is at-least-once: a request can be computed twice when a replica dies, or when Redis or a
connection to it is lost. The answer is exactly-once: the sender holds each request until it is answered,
sends it again if its entry is gone, and drops second replies.

A death makes suspects of the requests that the replica held. They come with ``attempt`` ≥ 1 and must be
computed alone, each announced by ``mark_running``: whoever dies over one shows that the request is poison.
"""
