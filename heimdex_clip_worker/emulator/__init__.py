"""An emulator of the platform: job queue, supervised workers, HTTP server. For development only.

May import errors.
"""
