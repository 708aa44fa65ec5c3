"""The gateway's own HTTP server: HTTP/1.1 and HTTP/2 (and so gRPC) on one port, on one event loop.

Why our own: in servers made for everything, each call pays for a task, a future, a dictionary of headers
and, where Python sits inside a proxy, for two changes of thread. A call that this server was told a plan
for pays for none of them: its head is looked up by its bytes, its body is handed to a function, and all
answers of one tick of the loop leave in one write. Every other call is served as ASGI.

What the protocols ask for beside that is written here once: framing, flow control, limits, draining.
Header compression comes from `hpack`, the parsing of HTTP/1 heads from `h11`.

    server    the socket, what all connections share, and who must go when there is too much of something
    http1     a connection of HTTP/1; turn: a call on it; chunks: bodies of unknown length
    http2     a connection of HTTP/2; stream: a call on it; frames, hpack: its language
    carrier ◀ sending ◀ control ◀ http2: writing ◀ windows and turns ◀ settings, resets, faults ◀ calls
    exchange  a call as ASGI; ports: a call by plan
"""
