"""The command line: one module per command, and console output.

May import anything; heavy imports stand inside the functions of a command.
"""
