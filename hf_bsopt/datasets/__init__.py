"""The lengths of a dataset's sequences, and the cost of each max_length. Start with length_report.py."""
