"""`dtrain doctor`: what of this machine, its software and its storage would keep a run from working, and what to do."""
