"""`python -m nanochat.core_download` as before 0.2: the command is `python -m scripts.core_download`."""

if __name__ == "__main__":
    from scripts.core_download import main

    main()
