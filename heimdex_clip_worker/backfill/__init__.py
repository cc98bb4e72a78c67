"""Rows, files, Parquet, PostgreSQL, Supabase, and the run that gives every row its vector.

May import errors, settings, client and remote.
"""
