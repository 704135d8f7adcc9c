"""Where the batches of the loop come from: drawn from the student for each step, or given."""
