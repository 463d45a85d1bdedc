"""Studies: a grid of training runs that decides one claim, its records, and its report."""
