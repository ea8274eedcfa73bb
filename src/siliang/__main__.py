"""python -m siliang."""

from siliang.cli.main import main

main()
