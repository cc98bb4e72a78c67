"""Rows, files, Parquet, PostgreSQL, Supabase, the run that gives every row its vector, and its shards.

May import errors, settings, client and remote.
"""
