"""The command line, one module a command. A module has SUMMARY, add_arguments(parser) and run(args) -> exit code.

Heavy imports stay inside `run`, so that `--help` answers at once.
"""
