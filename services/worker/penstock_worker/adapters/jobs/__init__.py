"""How a node runs tasks of jobs.

agent ──▶ fork server ──fork──▶ launcher ──fork──▶ rank 0, rank 1, …
  ▲                              │    └──fork──▶ group (torch.distributed elastic)
  └── desk (a socket) ◀──────────┴── ranks: data, checkpoints, events, results

host         starts launchers and knows of each what it has said: what a keeper sees
desk         the agent's end of the socket; `line` is the processes' end
launcher     one process with one thread: forks ranks, reads their output, watches their memory, and
             leaves nothing behind; `group` is the process beside it that finds the other ranks
rank         what runs in a rank; `context` is what the work there is given
services     what the desk does for a task: fetching, checkpoints, publishing, events
rooms        what outlives a task: `checkpoints` on the disk, `uploads` of them
agreement    how ranks of several nodes choose a checkpoint and send one another its parts
spool        events of a task in a file until they are stored; `events` sends them
script       programs of users, with `penstock.training`
"""
