"""`python -m imprompt`, for launchers such as torchrun."""

from imprompt.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
