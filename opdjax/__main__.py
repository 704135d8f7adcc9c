"""`python -m opdjax`: the console command where it is not on the path."""

from opdjax.cli.main import main

if __name__ == "__main__":
    main()
