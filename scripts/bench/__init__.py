"""The benchmark: other libraries on the same grid, the machine's own limit, and how cost grows. See README.md."""
