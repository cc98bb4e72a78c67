"""Exploring vectors: collections of pictures, figures, and widgets for JupyterLab.

May import anything but handler and emulator; nothing imports it but notebooks and tools.
"""
