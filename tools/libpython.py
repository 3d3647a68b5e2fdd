"""Print the directory of this Python's shared library; exit 1 if there is none to link against."""

import sys
import sysconfig
from pathlib import Path

directory = Path(sysconfig.get_config_var("LIBDIR") or "")
version = f"{sys.version_info.major}.{sys.version_info.minor}"
found = sysconfig.get_config_var("Py_ENABLE_SHARED") and (directory / f"libpython{version}.so").exists()
if not found:
    sys.exit(1)
print(directory)
