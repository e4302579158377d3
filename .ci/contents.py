"""Fail unless a wheel holds every file of the package that git knows, and besides them only its own records."""

from __future__ import annotations

import subprocess
import sys
from zipfile import ZipFile

listed = subprocess.run(["git", "ls-files", "src"], capture_output=True, text=True, check=True).stdout.split()
source = {path.removeprefix("src/") for path in listed}
packed = {name for name in ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
if source != packed:
    sys.exit(f"only in the source: {sorted(source - packed)}; only in the wheel: {sorted(packed - source)}")
