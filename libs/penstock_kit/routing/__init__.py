"""Who answers under which name: the scheduler's routing table, and how it is followed.

Gateways route the calls of clients by it; replicas that call other models (ensembles) theirs.
`table` and `model` are pure; `watch` talks to the scheduler.
"""
