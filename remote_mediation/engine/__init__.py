"""Everything that knows torch and nnsight: rows are compiled to jobs here, and jobs run."""
