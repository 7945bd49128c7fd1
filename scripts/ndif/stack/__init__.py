"""A real NDIF server on one CPU machine, for the commands beside this package.

    settings (ports, paths, environment) ─► parts (one command line each) ─► control (start, watch, stop) ─► processes

The standard library only: this runs before anything is installed.
"""
