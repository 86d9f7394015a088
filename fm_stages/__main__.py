"""``python -m fm_stages``."""

from fm_stages.cli import main

if __name__ == "__main__":
    main()
