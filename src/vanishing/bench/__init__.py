"""The matched-budget benchmark: tasks, arms, training, statistics and the report."""
