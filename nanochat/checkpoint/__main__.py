"""`python -m nanochat.checkpoint` as before 0.2: the command is `python -m scripts.checkpoint`."""

from __future__ import annotations

if __name__ == "__main__":
    from scripts.checkpoint import main

    main()
