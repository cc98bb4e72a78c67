"""Stand in the way of a library whose import takes seconds, in each of Ray's processes.

`jsonschema`, which Ray imports, takes it if it is there, and does without it if it is not.
JupyterLab brings it; where Ray runs, there is no JupyterLab.
"""

raise ImportError("left out, so that Ray's processes start in time")
