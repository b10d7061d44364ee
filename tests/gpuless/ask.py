"""Calls "module.function" of this folder with arguments in JSON; the last line it prints is the answer."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).with_name("stubs")))  # packages that nobody installs without a GPU
    module, _, function = sys.argv[1].partition(".")
    answer = getattr(importlib.import_module(f"tests.gpuless.{module}"), function)(**json.loads(sys.argv[2]))
    print(json.dumps(answer), flush=True)
    os._exit(0)  # the interpreter's end would ask the device for things that it cannot do
