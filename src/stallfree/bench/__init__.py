"""Measuring a server from outside: workloads, a load generator, capacity search, reports."""
