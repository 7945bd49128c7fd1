"""`python -m remote_mediation`."""

from remote_mediation.cli import main

main()
