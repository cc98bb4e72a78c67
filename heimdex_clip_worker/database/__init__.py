"""A column of vectors in PostgreSQL: kept in step, indexed, searched, audited and moved.

May import errors, settings, client, remote and backfill.
"""
