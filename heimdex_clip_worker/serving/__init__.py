"""What a job passes through: fetch, decode, children, budgets, batches, pipeline, selftest, set-up.

May import errors, settings, contract, auth and model.
"""
