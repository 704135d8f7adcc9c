"""`python -m opdjax`: the console command where it is not on the path."""

from opdjax.cli import main

main()
