"""`python -m nanochat.checkpoint` as before 0.2: the command is `python -m scripts.checkpoint`."""

if __name__ == "__main__":
    from scripts.checkpoint import main

    main()
