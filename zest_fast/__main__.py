"""`python -m zest_fast`: the command `zest-fast`, without the current folder in front of what is installed.

`-m` puts that folder first on sys.path, where a file of the user's called json.py or lightgbm.py would be taken for the
real module.
"""

import os
import sys

if not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # this package is found by its own __path__ from here on

from zest_fast.cli import app

if __name__ == "__main__":
    app(prog_name="zest-fast")
