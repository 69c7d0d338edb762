"""Adapter networks, loaded by name with `--network_module`."""
