"""What a job passes through: fetch, decode, budgets, batching, pipeline, selftest, process set-up.

May import errors, settings, contract, auth and model.
"""
