"""The command line. Front door: main.py; a module for each subcommand."""
