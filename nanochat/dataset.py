"""`python -m nanochat.dataset` as before 0.2: the command is `python -m scripts.dataset`."""

if __name__ == "__main__":
    from scripts.dataset import main

    main()
