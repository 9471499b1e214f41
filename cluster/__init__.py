"""The shared vocabulary: config machinery, JobPlan, WorkerEnv, storage, run-directory schemas, back ends.

Imports nothing else of dtrain and never torch, so a login node can load all of it in a blink.
"""
