"""The search for the batch size of a workload on a device. Start with pipeline.py."""
