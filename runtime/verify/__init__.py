"""`dtrain verify`: a strategy and one process on the same samples, what each step gave, and why they part."""
