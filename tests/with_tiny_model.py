"""``python -m with_tiny_model MODULE ...`` runs a module where the tiny model has a name.

open_clip 2 reads no model from a folder: every process has to register it for itself.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    import open_clip

    open_clip.add_model_config(os.environ["TINY_MODEL"])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
