"""The machine: devices, ports, locks, and processes that end with ours."""
