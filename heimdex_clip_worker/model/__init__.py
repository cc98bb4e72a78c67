"""The model: checkpoint, towers, preprocessing, serving artifact, image and text embedders,
golden vectors and their check.

May import errors.
"""
