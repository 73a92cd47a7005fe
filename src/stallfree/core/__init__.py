"""Scheduling: requests, KV blocks, policies, the scheduler.

Standard library only. Nothing here knows of tensors, clocks, threads, files or sockets, so the
same code schedules a live engine and a simulated one.
"""
