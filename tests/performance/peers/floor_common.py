"""What both floors share: the ready answers, and the little of a request that they look at."""

import json
import os
from pathlib import Path

REPLIES = {
    path: bytes.fromhex(reply)
    for path, reply in json.loads(Path(os.environ["BENCH_REPLIES"]).read_text()).items()
}


def identity(request):
    """The field `id` of a ModelInferRequest, tag and all, to be set in the answer: callers match by it.

    It is the third field; the first two are the model's name and version, written in this order.
    """
    at = 0
    while at < len(request) and request[at] in (0x0A, 0x12):
        at += 2 + request[at + 1]
    if at < len(request) and request[at] == 0x1A:
        return request[at : at + 2 + request[at + 1]]
    return b""
