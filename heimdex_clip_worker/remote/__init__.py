"""A job's way through the platform, and the local backend that stands in for it.

May import errors, settings, auth and contract; the local backend also the handler, inside functions.
"""
