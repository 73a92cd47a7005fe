"""`python -m stallfree.cli`: the same as `stallfree`."""

from stallfree.cli import main

main()
