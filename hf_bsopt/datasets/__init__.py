"""How long the sequences of a dataset are, and what each max_length costs. Front door: length_report.py."""
