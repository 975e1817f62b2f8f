"""What can be run: `python -m minipali COMMAND` runs the `main(argv)` of the file of that name.

`ask.py` and `report.py` are run.py without its options and its printing. A command raises InputError for what cannot be
used, and its main returns the exit status or None; `errors.run_command` turns whatever happens into one line and a
status.
"""
